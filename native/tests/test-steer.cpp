// The arithmetic of steer.cpp by itself: what must hold whatever the reference says. Exit status 1 on failure.

#include "steer.h"

#include <cmath>
#include <cstdio>
#include <limits>
#include <stdexcept>
#include <vector>

using localsteer::steer_program;

static int n_failed = 0;

static void check(bool ok, const char * what) {
    printf("%-70s %s\n", what, ok ? "ok" : "FAILED");
    n_failed += ok ? 0 : 1;
}

static const float INF = std::numeric_limits<float>::infinity();

struct edit {
    double  target;
    double  strength;
    uint8_t one_sided;
    float   cap;
};

static const edit SET = {2.0, 1.0, 0, INF};

// projections on units that are solved jointly; adds, if any, is one more row, which reads nothing
static steer_program make(size_t n_embd, const std::vector<float> & units, const std::vector<edit> & edits,
                          double ridge = 0.0, const std::vector<float> & adds = {}) {
    std::vector<float>   readers;
    std::vector<double>  biases;
    std::vector<float>   writers = units;
    std::vector<uint8_t> one_sided;
    std::vector<float>   caps;
    for (const auto & e : edits) {
        for (size_t i = 0; i < n_embd; ++i) {
            readers.push_back((float) -e.strength*units[biases.size()*n_embd + i]);
        }
        biases   .push_back(e.strength*e.target);
        one_sided.push_back(e.one_sided);
        caps     .push_back(e.cap);
    }
    if (!adds.empty()) {
        readers.resize(readers.size() + n_embd, 0.0f);
        writers.insert(writers.end(), adds.begin(), adds.end());
        biases   .push_back(1.0);
        one_sided.push_back(0);
        caps     .push_back(INF);
    }
    const std::vector<uint8_t> normalised(biases.size(), 0);
    return steer_program(n_embd, biases.size(), readers.data(), biases.data(), writers.data(), normalised.data(),
                         one_sided.data(), caps.data(), edits.size(), ridge);
}

// deterministic values in [-1, 1)
static std::vector<float> noise(size_t n, uint32_t seed) {
    std::vector<float> result(n);
    for (auto & value : result) {
        seed = 1664525u*seed + 1013904223u;
        value = (float) (seed >> 8)/(1 << 23) - 1.0f;
    }
    return result;
}

static double dot(const float * a, const float * b, size_t n) {
    double sum = 0.0;
    for (size_t i = 0; i < n; ++i) {
        sum += (double) a[i]*b[i];
    }
    return sum;
}

static std::vector<float> unit(size_t n, uint32_t seed) {
    auto u = noise(n, seed);
    const double norm = std::sqrt(dot(u.data(), u.data(), n));
    for (auto & value : u) {
        value = (float) (value/norm);
    }
    return u;
}

static bool near(double a, double b, double tolerance = 1e-5) {
    return std::fabs(a - b) <= tolerance*(1.0 + std::fabs(b));
}

// every width has to work, whatever the width of the machine's registers
static void test_projection_reaches_target() {
    bool ok = true;
    for (size_t n_embd = 1; n_embd <= 130; ++n_embd) {
        const auto u = unit(n_embd, 7);
        auto x = noise(3*n_embd, 11);
        make(n_embd, u, {SET}).apply(x.data(), 3);
        for (size_t ir = 0; ir < 3; ++ir) {
            ok = ok && near(dot(u.data(), x.data() + ir*n_embd, n_embd), 2.0);
        }
    }
    check(ok, "after one projection u.x equals the target, at every width");
}

static void test_joint_projections_reach_targets() {
    const size_t n_embd = 100;

    auto units = unit(n_embd, 1);
    for (uint32_t seed = 2; seed <= 3; ++seed) {
        const auto u = unit(n_embd, seed);
        units.insert(units.end(), u.begin(), u.end());
    }
    auto x = noise(n_embd, 5);
    make(n_embd, units, {{1.0, 1.0, 0, INF}, {-2.0, 1.0, 0, INF}, {3.0, 1.0, 0, INF}}).apply(x.data(), 1);

    const bool ok = near(dot(units.data(),            x.data(), n_embd),  1.0) &&
                    near(dot(units.data() +   n_embd, x.data(), n_embd), -2.0) &&
                    near(dot(units.data() + 2*n_embd, x.data(), n_embd),  3.0);
    check(ok, "three projections that are not orthogonal reach their targets together");
}

static void test_one_sided() {
    const std::vector<float> u = {1.0f, 0.0f};
    const std::vector<edit> raise = {{2.0, 1.0, 1, INF}};

    std::vector<float> x = {1.0f, 5.0f, 3.0f, 5.0f};
    make(2, u, raise).apply(x.data(), 2);
    check(x == std::vector<float>({2.0f, 5.0f, 3.0f, 5.0f}), "a one-sided projection raises and never lowers");

    // two directions: the one that stays out has no say
    const std::vector<float> units = {1.0f, 0.0f, 0.6f, 0.8f};
    std::vector<float> y = {3.0f, 0.0f};
    make(2, units, {{2.0, 1.0, 1, INF}, {5.0, 1.0, 0, INF}}).apply(y.data(), 1);
    const double rise = 5.0 - 1.8;
    check(near(y[0], 3.0 + 0.6*rise) && near(y[1], 0.8*rise), "a projection that stays out has no say");
}

static void test_cap_and_adds() {
    const std::vector<float> u = {1.0f, 0.0f};
    const std::vector<float> v = {0.0f, 7.0f};

    std::vector<float> x = {0.0f, 0.0f};
    make(2, u, {{10.0, 1.0, 0, 0.5f}}, 0.0, v).apply(x.data(), 1);
    check(x == std::vector<float>({0.5f, 7.0f}), "the cap bounds the weight and not what is added beside it");

    std::vector<float> y = {1.0f, 2.0f};
    make(2, {}, {}, 0.0, v).apply(y.data(), 1);
    check(y == std::vector<float>({1.0f, 9.0f}), "a program of adds alone");

    std::vector<float> z = {NAN, 2.0f};
    make(2, {}, {}, 0.0, v).apply(z.data(), 1);
    check(std::isnan(z[0]) && z[1] == 9.0f, "a row that reads nothing does not read a NaN");
}

static void test_gate() {
    const std::vector<float>   w          = {1.0f, 0.0f};
    const std::vector<float>   z          = {0.0f, 10.0f};
    const double               b          = -0.5;
    const std::vector<uint8_t> normalised = {1};
    const std::vector<uint8_t> one_sided  = {1};
    const std::vector<float>   caps       = {0.25f};

    // both rows have the root mean square 5/sqrt(2): the first weighs 3/rms - 0.5 = 0.35, the second less than 0
    const std::vector<float> x = {3.0f, 4.0f, -3.0f, 4.0f};
    const double g = 3.0/(5.0/std::sqrt(2.0)) + b;

    std::vector<float> y = x;
    const std::vector<float> free = {INF};
    steer_program(2, 1, w.data(), &b, z.data(), normalised.data(), one_sided.data(), free.data(), 0, 0.0)
        .apply(y.data(), 2);
    check(y[0] == 3.0f && near(y[1], 4.0 + 10.0*g) && y[2] == -3.0f && y[3] == 4.0f,
          "a gate reads the normalised row, and clipped at 0 it leaves a row alone");

    y = x;
    steer_program(2, 1, w.data(), &b, z.data(), normalised.data(), one_sided.data(), caps.data(), 0, 0.0)
        .apply(y.data(), 2);
    check(near(y[1], 4.0 + 10.0*0.25), "the cap bounds the weight of a gate");

    std::vector<float> zero = {0.0f, 0.0f};
    const double one = 1.0;
    steer_program(2, 1, w.data(), &one, z.data(), normalised.data(), one_sided.data(), free.data(), 0, 0.0)
        .apply(zero.data(), 1);
    check(zero == std::vector<float>({0.0f, 10.0f}), "a row of zeros gets the bias");
}

static void test_dependent_directions() {
    const std::vector<float> units = {1.0f, 0.0f, 1.0f, 0.0f};

    bool refused = false;
    try {
        make(2, units, {SET, SET});
    } catch (const std::invalid_argument &) {
        refused = true;
    }
    check(refused, "directions that depend on each other are refused");

    std::vector<float> x = {0.0f, 0.0f};
    make(2, units, {SET, SET}, 0.1).apply(x.data(), 1);
    check(near(x[0], 4.0/2.1), "and solved with a ridge");
}

static void test_nan_stays_visible() {
    const std::vector<float> u = {1.0f, 0.0f};
    std::vector<float> x = {NAN, 1.0f};
    make(2, {0.6f, 0.8f}, {{2.0, 1.0, 1, 1.0f}}).apply(x.data(), 1);
    check(std::isnan(x[0]) && std::isnan(x[1]), "a broken row stays visibly broken, and is not capped");
}

int main() {
    test_projection_reaches_target();
    test_joint_projections_reach_targets();
    test_one_sided();
    test_cap_and_adds();
    test_gate();
    test_dependent_directions();
    test_nan_stays_visible();

    return n_failed == 0 ? 0 : 1;
}
