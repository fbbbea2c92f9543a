// Tensors of another library, through DLPack's C exchange (https://dmlc.github.io/dlpack, version
// 1.3): a table of functions at the tensor's class, which say where a tensor lies, and how, and
// make new ones, without a call of Python. Declared is only what is used here.
#pragma once
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "arrays.h"
#include "fastbptt/buffer.h"

namespace fastbptt::bindings {
namespace dlpack {

struct Version {
  std::uint32_t major;
  std::uint32_t minor;
};

struct DataType {
  std::uint8_t code;  // 0 integers, 2 floats, 4 bfloat16
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  std::int32_t device;  // 1: the CPU
  std::int32_t device_id;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements
  std::uint64_t byte_offset;
};

struct ManagedTensor {
  Version version;
  void* context;
  void (*deleter)(ManagedTensor*);
  std::uint64_t flags;
  Tensor tensor;
};

struct Exchange {
  Version version;
  Exchange* previous;  // an older table
  void* allocator;
  void* managed_from_object;
  int (*object_from_managed)(ManagedTensor*, void** object);
  int (*describe)(void* object, Tensor*);
  void* work_stream;
};

}  // namespace dlpack

enum class Dtype { float32, float64, bfloat16, int64, other };

inline const char* name_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
      return "float32";
    case Dtype::float64:
      return "float64";
    case Dtype::bfloat16:
      return "bfloat16";
    case Dtype::int64:
      return "int64";
    default:
      return "another dtype";
  }
}

inline Index bytes_of(Dtype dtype) {
  if (dtype == Dtype::bfloat16) return 2;
  return dtype == Dtype::float32 ? 4 : 8;
}

// Where a tensor lies; good while the tensor lives and nobody resizes it. Strides in elements.
struct View {
  static constexpr int most_axes = 3;
  void* data = nullptr;
  Dtype dtype = Dtype::other;
  int axes = 0;
  Index shape[most_axes];
  Index strides[most_axes];

  explicit operator bool() const { return data != nullptr; }
  template <class S>
  S* at() const {
    return static_cast<S*>(data);
  }
  bool has_shape(std::initializer_list<Index> wanted) const {
    return std::equal(shape, shape + axes, wanted.begin(), wanted.end());
  }
  // Whether the last `count` axes lie without gaps, the last one fastest.
  bool is_dense(int count) const {
    Index step = 1;
    for (int i = axes - 1; i >= axes - count; --i) {
      if (shape[i] != 1 && strides[i] != step) return false;
      step *= shape[i];
    }
    return true;
  }
  std::string text() const { return name_of(dtype) + (" " + shape_text({shape, shape + axes})); }
};

// The tensors of one library.
class Tensors {
 public:
  // Its class of tensors, and one derived from it whose objects are as plain.
  Tensors(const py::type& tensor, const py::type& parameter)
      : tensor_(tensor), parameter_(parameter) {
    constexpr std::uint32_t major = 1;
    const py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
    void* const table = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
    if (!table) throw py::error_already_set();
    for (exchange_ = static_cast<dlpack::Exchange*>(table);
         exchange_ && exchange_->version.major != major; exchange_ = exchange_->previous) {
    }
    if (!exchange_) throw py::import_error("DLPack: wanted version 1 of the C exchange");
  }

  // Whether it is of one of the two classes themselves, and not of one that may do anything.
  bool is_plain(py::handle object) const {
    const auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
    return type == tensor_.ptr() || type == parameter_.ptr();
  }

  // False if it has no memory on the CPU, or more axes than a View. Not for empty tensors.
  bool read(py::handle object, View& view) const {
    if (!is_plain(object) && !py::isinstance(object, tensor_)) return false;
    dlpack::Tensor found{};
    if (exchange_->describe(object.ptr(), &found) != 0) {
      PyErr_Clear();
      return false;
    }
    constexpr std::int32_t cpu = 1;
    if (!found.data || found.device != cpu || found.ndim > View::most_axes) return false;
    view.data = static_cast<char*>(found.data) + found.byte_offset;
    view.dtype = dtype_of(found.dtype);
    view.axes = found.ndim;
    for (int i = 0; i < found.ndim; ++i) {
      view.shape[i] = static_cast<Index>(found.shape[i]);
      view.strides[i] = static_cast<Index>(found.strides[i]);
    }
    return true;
  }

  // A new dense tensor, not initialised, over memory of this library, which goes with it: made here
  // it costs a third of what a call of torch's own does, and large memory serves the next training
  // step, where torch would get its pages from the system each time.
  py::object empty(Dtype dtype, const View& shape, View& view) const {
    struct Owner : dlpack::ManagedTensor {
      Buffer<std::byte> buffer;
      std::int64_t shape[View::most_axes], strides[View::most_axes];
    };
    auto owner = std::make_unique<Owner>();
    view.axes = shape.axes;
    view.dtype = dtype;
    Index size = 1;
    for (int i = shape.axes - 1; i >= 0; --i) {
      owner->shape[i] = view.shape[i] = shape.shape[i];
      owner->strides[i] = view.strides[i] = size;
      size *= shape.shape[i];
    }
    owner->buffer = Buffer<std::byte>(size * bytes_of(dtype));
    view.data = owner->buffer.data();
    owner->version = {1, 0};
    owner->deleter = [](dlpack::ManagedTensor* self) { delete static_cast<Owner*>(self); };
    owner->tensor = {view.data,      1, 0, shape.axes, of_floats(dtype), owner->shape,
                     owner->strides, 0};
    void* object = nullptr;
    // It takes the owner even where it fails.
    if (exchange_->object_from_managed(owner.release(), &object) != 0)
      throw py::error_already_set();
    return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
  }

 private:
  static Dtype dtype_of(dlpack::DataType found) {
    if (found.lanes != 1) return Dtype::other;
    if (found.code == 2 && found.bits == 32) return Dtype::float32;
    if (found.code == 2 && found.bits == 64) return Dtype::float64;
    if (found.code == 4 && found.bits == 16) return Dtype::bfloat16;
    return found.code == 0 && found.bits == 64 ? Dtype::int64 : Dtype::other;
  }
  static dlpack::DataType of_floats(Dtype dtype) {
    const bool narrow = dtype == Dtype::bfloat16;
    return {narrow ? std::uint8_t(4) : std::uint8_t(2), std::uint8_t(8 * bytes_of(dtype)), 1};
  }

  py::type tensor_, parameter_;
  dlpack::Exchange* exchange_ = nullptr;
};

}  // namespace fastbptt::bindings
