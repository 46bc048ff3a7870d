// The arithmetic of steering: what one program does to one row of the residual stream.
//
// C++ standard library only: nothing here knows of llama.cpp, ggml or Python. localsteer/steering.py is the
// reference; a test compares the two on captured rows.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace localsteer {

// What a token gets at one block, in one position class: k projections, set jointly, then an offset.
//
//   p_i = u_i . x                            the projection now
//   t_i = p_i + strength_i (target_i - p_i)  where it should be
//   a one-sided projection joins only where t_i > p_i
//   c   = (G + ridge I)^-1 (t - p)           over those that joined, G_ij = u_i . u_j: the least-norm change
//   c_i <- clip(c_i, -cap_i, cap_i)
//   x   <- x + sum_i c_i u_i + offset
class steer_program {
public:
    // units: k x n_embd, each of length 1. offset: n_embd values, or null for none
    // throws std::invalid_argument if the directions can't be solved for: the plan should have refused them
    steer_program(size_t n_embd, size_t k, const float * units, const double * targets, const double * strengths,
                  const uint8_t * one_sided, const float * caps, double ridge, const float * offset);

    // x: n_rows x n_embd, contiguous, changed in place; not reentrant, the program holds the scratch
    void apply(float * x, size_t n_rows);

private:
    size_t n_embd;
    size_t k;

    std::vector<float>   units;
    std::vector<double>  targets;
    std::vector<double>  strengths;
    std::vector<uint8_t> one_sided;
    std::vector<float>   caps;
    std::vector<float>   offset;

    std::vector<double> gram;   // k x k, ridge included
    std::vector<double> factor; // its Cholesky factor, lower triangle

    bool any_one_sided = false;

    // scratch for one row
    std::vector<double> weights;
    std::vector<double> sub_factor;
    std::vector<double> sub_rhs;
    std::vector<size_t> joined;

    void apply_single(float * x) const;
    void apply_joint (float * x);

    void solve();
    void solve_subset();
};

} // namespace localsteer
