#include "steer.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace localsteer {

// enough independent sums to fill two 512-bit registers: compilers may not reorder float additions by
// themselves, so one running sum would stay scalar
static constexpr size_t N_LANES = 32;

// as in localsteer/steering.py
static constexpr double RMS_EPS = 1e-12;

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

// x += scale*z
static void add_scaled(float * x, const float * z, float scale, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        x[i] += scale*z[i];
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

steer_program::steer_program(size_t n_embd, size_t k, const float * readers, const double * biases,
                             const float * writers, const uint8_t * normalised, const uint8_t * one_sided,
                             const float * caps, size_t n_solved, double ridge)
    : n_embd(n_embd),
      k(k),
      n_solved(n_solved),
      readers(readers, readers + k*n_embd),
      biases(biases, biases + k),
      writers(writers, writers + k*n_embd),
      normalised(normalised, normalised + k),
      one_sided(one_sided, one_sided + k),
      caps(caps, caps + k),
      gram(n_solved*n_solved),
      weights(k),
      rhs(n_solved) {
    for (size_t i = 0; i < k; ++i) {
        const float * w = readers + i*n_embd;
        reads.push_back(std::any_of(w, w + n_embd, [](float value) { return value != 0.0f; }));
        this->normalised[i] = normalised[i] && reads[i];
        any_normalised = any_normalised || this->normalised[i];
    }

    for (size_t i = 0; i < n_solved; ++i) {
        for (size_t j = 0; j < n_solved; ++j) {
            gram[i*n_solved + j] = dot_f64(writers + i*n_embd, writers + j*n_embd, n_embd) + (i == j ? ridge : 0.0);
        }
    }

    factor = gram;
    if (!factorise(factor.data(), n_solved)) {
        throw std::invalid_argument("the directions of one layer depend on each other");
    }

    joined.reserve(n_solved);
}

void steer_program::apply(float * x, size_t n_rows) {
    for (size_t ir = 0; ir < n_rows; ++ir) {
        float * row = x + ir*n_embd;
        read(row);
        solve();
        write(row);
    }
}

void steer_program::read(const float * x) {
    const double rms = any_normalised ? std::sqrt(dot(x, x, n_embd)/n_embd + RMS_EPS) : 1.0;

    for (size_t i = 0; i < k; ++i) {
        const double p = reads[i] ? dot(readers.data() + i*n_embd, x, n_embd) : 0.0;
        const double g = biases[i] + (normalised[i] ? p/rms : p);

        // a NaN is not <= 0: a broken row stays visibly broken
        weights[i] = one_sided[i] && g <= 0.0 ? 0.0 : g;
    }
}

// the rows that do not act have no say in the others' weights
void steer_program::solve() {
    joined.clear();
    for (size_t i = 0; i < n_solved; ++i) {
        if (!one_sided[i] || weights[i] != 0.0) {
            joined.push_back(i);
        }
    }

    const size_t n = joined.size();
    for (size_t i = 0; i < n; ++i) {
        for (size_t j = 0; j < n; ++j) {
            factor[i*n + j] = gram[joined[i]*n_solved + joined[j]];
        }
        rhs[i] = weights[joined[i]];
    }

    // a principal submatrix of a positive definite matrix is positive definite: this can't fail. A few rows are
    // factorised faster than one is read
    factorise(factor.data(), n);
    solve_factored(factor.data(), rhs.data(), n);

    for (size_t i = 0; i < n; ++i) {
        weights[joined[i]] = rhs[i];
    }
}

void steer_program::write(float * x) const {
    for (size_t i = 0; i < k; ++i) {
        const double c = clip(weights[i], caps[i]);
        if (c != 0.0) {
            add_scaled(x, writers.data() + i*n_embd, (float) c, n_embd);
        }
    }
}

} // namespace localsteer
