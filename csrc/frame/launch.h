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

  // Appends a vector that must be like the state, in its dtype or a narrower one of the model.
  void add(const char* argument, const Tensor& t, int index = -1);
  // Appends the state itself as the next vector.
  void add_state();

  // The op's scalars: `values` from the host or `coef` [m] or [B, m].
  void parameters(const std::optional<Tensor>& coef, const std::vector<double>& values, int64_t columns,
                  const char* argument = "coef");
  // Noise as the last vector, if there is a seed.
  void noise(const std::optional<Tensor>& seed);

  Result& output(DType dtype);
  Result& output(const Tensor& out);
  // [B, columns] float64.
  Tensor scalars(int64_t columns);

  // The parameters of sample b (0 if shared), for checks.
  const double* parameter_row(int64_t b) const;
  int64_t parameter_rows() const;

  // Runs the kernel and returns the outputs, each where it belongs.
  std::vector<Tensor> run();

  FrameCall call;
  const View& state() const { return state_; }
  DType dtype_of(int vector) const { return call.stream[vector].dtype; }

 private:
  void append(const Tensor& t, View view);

  const char* op_;
  const char* first_name_;
  int first_index_;
  Tensor first_;
  View state_;
  std::optional<DType> model_;  // the second dtype of the call, once one was seen
  Walk walk_;
  std::vector<Tensor> keep_;  // copies and parameters alive until the kernel is done
  std::vector<double> values_;
  std::vector<View> inputs_;
  std::vector<Result> results_;
};

}  // namespace marquardt
