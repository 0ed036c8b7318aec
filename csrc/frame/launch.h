// From tensors to a FrameCall: the checks and layouts that every frame op shares. An op's launcher names its tensors
// in the order of its rows and says which outputs it has.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "core/tensor.h"
#include "frame/frame.h"

namespace marquardt {

class FrameLauncher {
 public:
  // `first` is the state: its shape, device, dtype and layout rule the call. `noisy` calls walk in row-major order,
  // because noise is indexed so.
  FrameLauncher(const char* op, const char* argument, const Tensor& first, int index, int64_t batch_dims, bool noisy);

  // A call about a stack [B, k, *sample] alone: the state is one row of it. Its rows are added by `add_stack`.
  FrameLauncher(const char* op, const char* argument, const Tensor& stack, int64_t batch_dims);

  // Appends the k rows of a stack [B, k, *sample], or [k, *sample] where the batch shares it; k is returned.
  int add_stack(const char* argument, const Tensor& stack);

  // Appends a vector that must be like the state, in its dtype or a narrower one of the model.
  void add(const char* argument, const Tensor& t, int index = -1);
  // Appends the state itself as the next vector.
  void add_state();

  // The op's scalars, float64: `coef` [m] on the CPU, shared by the batch, or [B, m] beside the data.
  void parameters(const Tensor& coef, int64_t columns);
  // Appends the tangents of the scalars, [m] or [B, m], to each row of parameters.
  void tangents(const Tensor& coef_t);
  // Sets one scalar to 0 in every row.
  void zero_parameter(int64_t column);
  // Noise as the last vector, if there is a seed.
  void noise(const std::optional<Tensor>& seed);

  void output(DType dtype);
  void output(const Tensor& out);
  // The next output, and the one behind it, as the halves [0, B) and [B, 2B) of one tensor like the state.
  void output_twice(DType dtype);
  // k outputs behind one another: [B, k, *sample], or [k, *sample] in an unbatched call.
  Tensor output_stack(int count, DType dtype);
  // [B, columns] float64.
  Tensor scalars(int64_t columns);

  // The parameters of sample b (0 if shared), for checks, and how many rows of them the host can read: none of those
  // that lie on a GPU.
  const double* parameter_row(int64_t b) const;
  int64_t readable_rows() const;

  // Runs the kernel and returns the outputs, each where it belongs.
  std::vector<Tensor> run();
  // The same for an op with one output.
  Tensor run_one();

  FrameCall call;
  const View& state() const { return state_; }
  DType dtype_of(int vector) const { return call.stream[vector].dtype; }

 private:
  void append(const Tensor& t, View view);
  void append(Result result);
  // Rows of float64 numbers, [m] or [B, m]: they lie behind one another, in place or in a copy.
  struct Rows {
    const double* data = nullptr;
    bool shared = false;  // [m], on the CPU
    bool on_cpu = true;
    bool dense = true;  // false on a GPU alone: elsewhere `copy` holds what lay otherwise
    std::vector<double> copy;
  };
  Rows rows_of(const char* argument, const Tensor& t, int64_t columns) const;
  void use_values(std::vector<double> values, int64_t columns, bool shared);
  // The same for a table [B, columns] on the GPU.
  void use_table(Tensor table, int64_t columns);

  // Checks of what stands beside the state: device and dtypes.
  void check_beside(const char* argument, int index, const View& view);

  const char* op_;
  const char* first_name_;
  int first_index_;
  Tensor first_;
  int64_t row_sizes_[kMaxDims], row_strides_[kMaxDims];  // of the state, where it is a row of a stack
  View state_;
  bool gpu_;
  std::optional<DType> model_;  // the second dtype of the call, once one was seen
  Walk walk_;
  std::vector<Tensor> copies_;    // inputs that lay otherwise, alive until the kernel is done
  const Tensor* coef_ = nullptr;  // the parameters as a tensor, where they lie on a GPU
  std::vector<double> values_;    // parameters that could not be read where they lie
  Tensor table_;                  // the same on a GPU
  int64_t columns_ = 0;
  bool readable_ = true;  // whether the host reads the parameters
  View inputs_[kMaxVectors];
  std::optional<Result> result_;  // the first output, and the others
  std::vector<Result> more_results_;
};

}  // namespace marquardt
