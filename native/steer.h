// The arithmetic of steering: what one program does to one row of the residual stream.
//
// C++ standard library only: nothing here knows of llama.cpp, ggml or Python. localsteer/steering.py is the
// reference; a test compares the two on captured rows.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace localsteer {

// The edits of a token at one layer, in one position class: k weights, all computed from the same x, times k writers.
//
//   g_i = w_i . n_i(x) + b_i         n_i(x) is x, or x/rms(x)
//   a one-sided row does not act (c_i = 0) where g_i <= 0
//   c   = g, but for those of the first n_solved rows that act c = (G + ridge I)^-1 g, G_ij = z_i . z_j
//   c_i <- clip(c_i, -cap_i, cap_i)
//   x   <- x + sum_i c_i z_i
//
// Setting a projection, adding a constant and a learned gate are all this: localsteer/plan.py fills in w, b and z.
class steer_program {
public:
    // readers (w), writers (z): k x n_embd. A reader of zeros reads nothing, not even a NaN
    // throws std::invalid_argument if the writers can't be solved for: the plan should have refused them
    steer_program(size_t n_embd, size_t k, const float * readers, const double * biases, const float * writers,
                  const uint8_t * normalised, const uint8_t * one_sided, const float * caps, size_t n_solved,
                  double ridge);

    // x: n_rows x n_embd, contiguous, changed in place; not reentrant, the program holds the scratch
    void apply(float * x, size_t n_rows);

private:
    size_t n_embd;
    size_t k;
    size_t n_solved;

    std::vector<float>   readers;
    std::vector<double>  biases;
    std::vector<float>   writers;
    std::vector<uint8_t> normalised;
    std::vector<uint8_t> one_sided;
    std::vector<float>   caps;
    std::vector<uint8_t> reads; // the reader is not zero: a constant row costs no dot product

    bool any_normalised = false;

    std::vector<double> gram; // n_solved x n_solved, ridge included

    // scratch for one row
    std::vector<double> weights;
    std::vector<double> factor; // Cholesky factor of the rows that act, lower triangle
    std::vector<double> rhs;
    std::vector<size_t> joined;

    void read (const float * x);
    void solve();
    void write(float * x) const;
};

} // namespace localsteer
