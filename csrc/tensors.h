// What both libraries need of torch's stable ABI.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <optional>

#if defined(__linux__)
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();  // torch 2.13 and later
#endif

namespace tokenpool {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What torch says of its last failure in this thread, where it can be asked.
inline const char* reason_of_torch() {
#if defined(__linux__)
  if (torch_exception_get_what_without_backtrace != nullptr) return torch_exception_get_what_without_backtrace();
#endif
  return "out of memory? This torch does not say (2.13 and later do)";
}

inline Tensor side_by_side(const Tensor& t) {
  bool succeeded = true;
  Tensor result = t;
  try {
    result = torch::stable::contiguous(t);
  } catch (const std::exception&) {  // its text is that of the call, not of the failure
    succeeded = false;
  }
  STD_TORCH_CHECK(succeeded, "tokenpool_ext: torch could not copy ", t.numel() * static_cast<int64_t>(t.element_size()),
                  " bytes to lie side by side: ", reason_of_torch());
  return result;
}

// torch looks an op up by its name at every call: not where there is nothing to do.
inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : side_by_side(t);
}

inline std::optional<Tensor> dense(const std::optional<Tensor>& t) {
  if (!t) return std::nullopt;
  return dense(*t);
}

// Of one number, of the types that are made here.
inline int64_t bytes_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    default:
      return 1;
  }
}

// A contiguous tensor on the device of `like`, not initialised. (torch::stable::new_empty goes through the dispatcher
// by name.)
inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  std::array<int64_t, 4> stride{};
  int64_t step = 1;
  for (size_t axis = shape.size(); axis-- > 0;) {
    stride[axis] = step;
    step *= std::max<int64_t>(shape.begin()[axis], 1);
  }
  int32_t device_type = 0;
  AtenTensorHandle made = nullptr;
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  const bool succeeded =
      aoti_torch_get_device_type(like.get(), &device_type) == AOTI_TORCH_SUCCESS &&
      aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.begin(), stride.data(), code, device_type,
                               like.get_device_index(), &made) == AOTI_TORCH_SUCCESS;
  STD_TORCH_CHECK(succeeded, "tokenpool_ext: torch could not allocate ", step * bytes_of(type),
                  " bytes: ", reason_of_torch());
  return Tensor(made);
}

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> shape) {
  return new_tensor(like, shape, like.scalar_type());
}

inline Tensor filled(Tensor t, double value) {
  torch::stable::fill_(t, value);
  return t;
}

template <class T>
const T* pointer(const std::optional<Tensor>& t) {
  return t ? static_cast<const T*>(t->data_ptr()) : nullptr;
}

}  // namespace tokenpool
