#include "steer.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace localsteer {

// enough independent sums to fill two 512-bit registers: compilers may not reorder float additions by
// themselves, so one running sum would stay scalar
static constexpr size_t N_LANES = 32;

static double dot(const float * a, const float * b, size_t n) {
    float sums[N_LANES] = {0.0f};

    size_t i = 0;
    for (; i + N_LANES <= n; i += N_LANES) {
        for (size_t l = 0; l < N_LANES; ++l) {
            sums[l] += a[i + l]*b[i + l];
        }
    }

    double sum = 0.0;
    for (size_t l = 0; l < N_LANES; ++l) {
        sum += sums[l];
    }
    for (; i < n; ++i) {
        sum += (double) a[i]*b[i];
    }

    return sum;
}

static double dot_f64(const float * a, const float * b, size_t n) {
    double sum = 0.0;
    for (size_t i = 0; i < n; ++i) {
        sum += (double) a[i]*b[i];
    }
    return sum;
}

// x += scale*u
static void add_scaled(float * x, const float * u, float scale, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        x[i] += scale*u[i];
    }
}

// the order of the arguments lets a NaN through: std::min and std::max return the first where neither is less
static double clip(double value, double cap) {
    return std::max(std::min(value, cap), -cap);
}

// Cholesky, in place in the lower triangle of a (n x n, row-major); false if a is not positive definite
static bool factorise(double * a, size_t n) {
    for (size_t j = 0; j < n; ++j) {
        for (size_t i = j; i < n; ++i) {
            double sum = a[i*n + j];
            for (size_t m = 0; m < j; ++m) {
                sum -= a[i*n + m]*a[j*n + m];
            }
            if (i > j) {
                a[i*n + j] = sum/a[j*n + j];
            } else if (sum > 1e-12) {
                a[j*n + j] = std::sqrt(sum);
            } else {
                return false;
            }
        }
    }
    return true;
}

// b <- a^-1 b, with the factor from above
static void solve_factored(const double * factor, double * b, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        for (size_t m = 0; m < i; ++m) {
            b[i] -= factor[i*n + m]*b[m];
        }
        b[i] /= factor[i*n + i];
    }
    for (size_t i = n; i-- > 0;) {
        for (size_t m = i + 1; m < n; ++m) {
            b[i] -= factor[m*n + i]*b[m];
        }
        b[i] /= factor[i*n + i];
    }
}

steer_program::steer_program(size_t n_embd, size_t k, const float * units, const double * targets,
                             const double * strengths, const uint8_t * one_sided, const float * caps, double ridge,
                             const float * offset)
    : n_embd(n_embd),
      k(k),
      units(units, units + k*n_embd),
      targets(targets, targets + k),
      strengths(strengths, strengths + k),
      one_sided(one_sided, one_sided + k),
      caps(caps, caps + k),
      offset(offset, offset ? offset + n_embd : nullptr),
      gram(k*k),
      weights(k),
      sub_factor(k*k),
      sub_rhs(k) {
    for (size_t i = 0; i < k; ++i) {
        for (size_t j = 0; j < k; ++j) {
            gram[i*k + j] = dot_f64(units + i*n_embd, units + j*n_embd, n_embd) + (i == j ? ridge : 0.0);
        }
        any_one_sided = any_one_sided || one_sided[i];
    }

    factor = gram;
    if (!factorise(factor.data(), k)) {
        throw std::invalid_argument("the directions of one block depend on each other");
    }

    joined.reserve(k);
}

void steer_program::apply(float * x, size_t n_rows) {
    for (size_t ir = 0; ir < n_rows; ++ir) {
        float * row = x + ir*n_embd;
        if (k == 1) {
            apply_single(row);
        } else if (k > 1) {
            apply_joint(row);
        }
        if (!offset.empty()) {
            add_scaled(row, offset.data(), 1.0f, n_embd);
        }
    }
}

// one projection is what nearly every plan holds
void steer_program::apply_single(float * x) const {
    const double p      = dot(units.data(), x, n_embd);
    const double wanted = strengths[0]*(targets[0] - p);

    // a NaN is not <= 0: a broken row stays visibly broken
    if (one_sided[0] && wanted <= 0.0) {
        return;
    }

    const double c = clip(wanted/gram[0], caps[0]);
    add_scaled(x, units.data(), (float) c, n_embd);
}

void steer_program::apply_joint(float * x) {
    for (size_t i = 0; i < k; ++i) {
        const double p = dot(units.data() + i*n_embd, x, n_embd);
        weights[i] = strengths[i]*(targets[i] - p);
    }

    if (any_one_sided) {
        solve_subset();
    } else {
        solve();
    }

    for (size_t i = 0; i < k; ++i) {
        const double c = clip(weights[i], caps[i]);
        if (c != 0.0) {
            add_scaled(x, units.data() + i*n_embd, (float) c, n_embd);
        }
    }
}

void steer_program::solve() {
    solve_factored(factor.data(), weights.data(), k);
}

// the projections that stay out of this row get weight 0 and no say in the others' weights
void steer_program::solve_subset() {
    joined.clear();
    for (size_t i = 0; i < k; ++i) {
        if (!one_sided[i] || !(weights[i] <= 0.0)) {
            joined.push_back(i);
        }
    }

    const size_t n = joined.size();
    if (n == k) {
        solve();
        return;
    }

    std::vector<double> & rhs = sub_rhs;
    for (size_t i = 0; i < n; ++i) {
        for (size_t j = 0; j < n; ++j) {
            sub_factor[i*n + j] = gram[joined[i]*k + joined[j]];
        }
        rhs[i] = weights[joined[i]];
    }

    // a principal submatrix of a positive definite matrix is positive definite: this can't fail
    factorise(sub_factor.data(), n);
    solve_factored(sub_factor.data(), rhs.data(), n);

    std::fill(weights.begin(), weights.end(), 0.0);
    for (size_t i = 0; i < n; ++i) {
        weights[joined[i]] = rhs[i];
    }
}

} // namespace localsteer
