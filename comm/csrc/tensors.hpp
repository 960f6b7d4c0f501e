// What lies behind a tensor of Python's, by the exchange that DLPack 1.3 lays down for extensions (`DLPackExchangeAPI` in
// dlpack.h; PyTorch has it since 2.10). All of it in 55 ns, which from Python each single property costs; no header of
// PyTorch's is needed.
#pragma once
#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <utility>

#include "dtype.hpp"

namespace phalanx {

struct TensorView {
  char* data;
  int dtype;
  int num_dims;
  const int64_t* shape;
  size_t numel = 1;

  size_t num_bytes() const { return numel * item_bytes(dtype); }
  bool is_like(const TensorView& other) const {
    return dtype == other.dtype && num_dims == other.num_dims && std::equal(shape, shape + num_dims, other.shape);
  }
};

class TensorReader {
 public:
  // type: torch.Tensor.
  explicit TensorReader(nanobind::object type) : type_(std::move(type)) {
    nanobind::object capsule = type_.attr("__dlpack_c_exchange_api__");
    void* table = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
    if (table == nullptr) throw nanobind::python_error();
    exchange_ = static_cast<const Exchange*>(table);
    if (exchange_->major != 1 || exchange_->view == nullptr) {
      throw std::runtime_error("PyTorch's tensors do not show themselves by DLPack 1; is this PyTorch too new?");
    }
  }

  // Whether `object` is a tensor on the CPU, contiguous, and of a dtype that has a code.
  bool read(nanobind::handle object, TensorView& view) const {
    if (!PyObject_TypeCheck(object.ptr(), reinterpret_cast<PyTypeObject*>(type_.ptr()))) return false;
    Tensor tensor;
    if (exchange_->view(object.ptr(), &tensor) != 0) {  // of what DLPack does not know, as sparse ones
      PyErr_Clear();
      return false;
    }
    view = {static_cast<char*>(tensor.data) + tensor.byte_offset, code_of(tensor), tensor.num_dims, tensor.shape};
    if (tensor.device_type != kCpu || view.dtype < 0) return false;
    for (int dim = tensor.num_dims - 1; dim >= 0; dim--) {
      if (tensor.shape[dim] != 1 && tensor.strides[dim] != int64_t(view.numel)) return false;
      view.numel *= size_t(tensor.shape[dim]);
    }
    return true;
  }

 private:
  static constexpr int32_t kCpu = 1;

  struct Tensor {
    void* data;
    int32_t device_type, device;
    int32_t num_dims;
    uint8_t kind, bits;
    uint16_t lanes;
    int64_t *shape, *strides;  // in elements
    uint64_t byte_offset;
  };

  struct Exchange {
    uint32_t major, minor;
    void* earlier;
    void *allocate, *take, *give;
    int (*view)(void* object, Tensor* out);  // what it shows is the object's own
    void* stream;
  };

  static int code_of(const Tensor& tensor) {
    enum Kind { kSigned = 0, kUnsigned = 1, kFloat = 2, kBrainFloat = 4 };
    switch (tensor.lanes == 1 ? tensor.kind << 8 | tensor.bits : -1) {
      case kBrainFloat << 8 | 16: return kBF16;
      case kFloat << 8 | 16: return kF16;
      case kFloat << 8 | 32: return kF32;
      case kFloat << 8 | 64: return kF64;
      case kSigned << 8 | 32: return kI32;
      case kSigned << 8 | 64: return kI64;
      case kSigned << 8 | 8: return kI8;
      case kUnsigned << 8 | 8: return kU8;
      default: return -1;
    }
  }

  nanobind::object type_;
  const Exchange* exchange_;
};

}  // namespace phalanx
