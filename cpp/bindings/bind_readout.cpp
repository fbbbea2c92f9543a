#include "arrays.h"
#include "concepts.h"
#include "fastbptt/readout.h"

namespace fastbptt::bindings {
namespace {

using Optional = const py::object&;

// Calls work with a value of the dtype of `array`.
template <class F>
auto by_dtype(const char* name, const py::array& array, F&& work) {
  if (py::isinstance<py::array_t<float>>(array)) return work(float{});
  if (py::isinstance<py::array_t<double>>(array)) return work(double{});
  throw py::type_error(std::string(name) + ": got dtype " + text_of(array.dtype()) +
                       ", wanted float32 or float64");
}

// x [..., K] as rows, contiguous.
template <class S>
py::array checked_rows(const char* name, const py::array& x, Index K) {
  if (x.ndim() == 2) return contiguous(checked<S>(name, x, {-1, K}));
  return contiguous(checked<S>(name, x, {-1, -1, K}));
}

template <class S>
py::array like(const py::array& x, Index last) {
  std::vector<Index> shape = shape_of(x);
  shape.back() = last;
  return new_array<S>(shape);
}

inline void check_not_empty(const char* name, const py::array& array) {
  if (array.size() == 0) {
    throw py::value_error(std::string(name) + ": got shape " + shape_text(shape_of(array)) +
                          ", wanted no axis of 0");
  }
}

// The readout's parameters, held while the work runs.
template <class S>
struct Parameters {
  Parameters(const py::array& weight_, Optional bias_)
      : weight(contiguous(checked<S>("weight", weight_, {-1, -1}))) {
    check_not_empty("weight", weight);
    if (bias_.is_none()) return;
    bias = contiguous(checked<S>("bias", bias_, {weight.shape(0)}));
    has_bias = true;
  }
  Linear<S> layer(const py::array& x) const {
    const Index K = weight.shape(1);
    return {K ? x.size() / K : 0, K,
            weight.shape(0),      data<S>(x),
            data<S>(weight),      has_bias ? data<S>(bias) : nullptr};
  }
  py::array weight;
  py::array bias;
  bool has_bias = false;
};

py::array bind_linear(const py::array& x, const py::array& weight, Optional bias, bool cuts) {
  return by_dtype("weight", weight, [&](auto scalar) {
    using S = decltype(scalar);
    const Parameters<S> parameters(weight, bias);
    const py::array rows = checked_rows<S>("x", x, parameters.weight.shape(1));
    py::array y = like<S>(rows, parameters.weight.shape(0));
    const Linear<S> layer = parameters.layer(rows);
    S* out = mutable_data<S>("y", y);
    without_gil([&](Interrupt interrupt) { linear(layer, out, cuts, interrupt); });
    return y;
  });
}

template <class S>
S* grad_data(const char* name, Optional grad, std::initializer_list<Index> shape) {
  return grad.is_none() ? nullptr : mutable_data<S>(name, checked<S>(name, grad, shape));
}

py::array bind_linear_backward(const py::array& x, const py::array& weight, const py::array& grad_y,
                               const py::array& grad_weight, Optional grad_bias) {
  return by_dtype("weight", weight, [&](auto scalar) {
    using S = decltype(scalar);
    const Parameters<S> parameters(weight, py::none());
    const Index N = parameters.weight.shape(0), K = parameters.weight.shape(1);
    const py::array rows = checked_rows<S>("x", x, K);
    const py::array grads = checked_rows<S>("grad_y", grad_y, N);
    const Linear<S> layer = parameters.layer(rows);
    if (grads.size() != layer.rows * N) {
      throw py::value_error("grad_y: got shape " + shape_text(shape_of(grad_y)) +
                            ", which does not fit x of shape " + shape_text(shape_of(x)));
    }
    py::array grad_x = like<S>(rows, K);
    S* out = mutable_data<S>("grad_x", grad_x);
    S* to_weight = grad_data<S>("grad_weight", grad_weight, {N, K});
    S* to_bias = grad_data<S>("grad_bias", grad_bias, {N});
    without_gil([&](Interrupt interrupt) {
      linear_backward(layer, data<S>(grads), out, to_weight, to_bias, interrupt);
    });
    return grad_x;
  });
}

template <class S>
py::tuple bind_readout_loss_of(Loss loss, const py::array& y, Optional weight, Optional bias,
                               const py::array& target, double scale, std::int64_t ignore_index,
                               Optional grad_weight, Optional grad_bias, bool need_grad,
                               Optional counts) {
  ReadoutLoss<S> job{};
  py::array w, b;
  if (!weight.is_none()) w = contiguous(checked<S>("weight", weight, {-1, -1}));
  const Index K = weight.is_none() ? y.shape(y.ndim() - 1) : w.shape(1);
  const Index N = weight.is_none() ? K : w.shape(0);
  if (K == 0 || N == 0)
    check_not_empty(weight.is_none() ? "y" : "weight", weight.is_none() ? y : w);
  if (!bias.is_none()) b = contiguous(checked<S>("bias", bias, {N}));
  const py::array rows = contiguous(checked<S>("y", y, {-1, -1, K}));
  const Index A = rows.shape(0), B = rows.shape(1);
  job.readout = {A * B,
                 K,
                 N,
                 data<S>(rows),
                 weight.is_none() ? nullptr : data<S>(w),
                 bias.is_none() ? nullptr : data<S>(b)};
  job.loss = loss;
  py::array wanted, rows_that_count;
  if (loss == Loss::cross_entropy) {
    wanted = own_copy(checked<std::int64_t>("target", target, {A, B}));
    job.classes = data<std::int64_t>(wanted);
    for (Index i = 0; i < A * B; ++i) {
      const std::int64_t k = job.classes[i];
      if ((k < 0 || k >= N) && k != ignore_index) {
        throw py::value_error("target: got class " + std::to_string(k) + ", wanted from 0 to " +
                              std::to_string(N - 1) + " or ignore_index");
      }
    }
  } else {
    wanted = contiguous(checked<S>("target", target, {A, B, N}));
    job.values = data<S>(wanted);
    if (!counts.is_none()) {
      rows_that_count = contiguous(checked<bool>("counts", counts, {A, B}));
      job.counts = data<bool>(rows_that_count);
    }
  }
  job.ignore_index = ignore_index;
  job.scale = scale;
  py::object grad = py::none();
  if (need_grad) {
    py::array grad_y = like<S>(rows, K);
    job.grad_x = mutable_data<S>("grad_y", grad_y);
    grad = grad_y;
    if (job.readout.weight) {
      job.grad_weight = grad_data<S>("grad_weight", grad_weight, {N, K});
      job.grad_bias = grad_data<S>("grad_bias", grad_bias, {N});
      if (!job.grad_weight) throw py::type_error("grad_weight: got None, wanted an array");
    }
  }
  double value = 0;
  without_gil([&](Interrupt interrupt) { value = readout_loss(job, interrupt); });
  return py::make_tuple(value, grad);
}

py::tuple bind_readout_loss(const std::string& loss, const py::array& y, Optional weight,
                            Optional bias, const py::array& target, double scale,
                            std::int64_t ignore_index, Optional grad_weight, Optional grad_bias,
                            bool need_grad, Optional counts) {
  if (loss != "cross_entropy" && loss != "mse") {
    throw py::value_error("loss: got '" + loss + "', wanted 'cross_entropy' or 'mse'");
  }
  if (y.ndim() != 3) {
    throw py::value_error("y: got shape " + shape_text(shape_of(y)) + ", wanted three axes");
  }
  const Loss kind = loss == "mse" ? Loss::mse : Loss::cross_entropy;
  return by_dtype("y", y, [&](auto scalar) {
    return bind_readout_loss_of<decltype(scalar)>(kind, y, weight, bias, target, scale,
                                                  ignore_index, grad_weight, grad_bias, need_grad,
                                                  counts);
  });
}

void bind_embedding_backward(const py::array& index, const py::array& grad,
                             const py::array& grad_weight) {
  by_dtype("grad", grad, [&](auto scalar) {
    using S = decltype(scalar);
    const py::array to = checked<S>("grad_weight", grad_weight, {-1, -1});
    const Index V = to.shape(0), E = to.shape(1);
    const py::array which = own_copy(checked<std::int64_t>("index", index, {-1, -1}));
    const py::array rows =
        contiguous(checked<S>("grad", grad, {index.shape(0), index.shape(1), E}));
    const std::int64_t* indices = data<std::int64_t>(which);
    for (Index i = 0; i < which.size(); ++i) {
      if (indices[i] < 0 || indices[i] >= V) {
        throw py::value_error("index: got " + std::to_string(indices[i]) + ", wanted from 0 to " +
                              std::to_string(V - 1));
      }
    }
    S* out = mutable_data<S>("grad_weight", to);
    const WithoutGil free;
    embedding_backward(which.size(), E, indices, data<S>(rows), out);
  });
}

}  // namespace

void bind_readout(py::module_& m) {
  m.def("linear", &bind_linear, py::arg("x"), py::arg("weight"), py::arg("bias"),
        py::arg("cuts") = false);
  m.def("linear_backward", &bind_linear_backward, py::arg("x"), py::arg("weight"),
        py::arg("grad_y"), py::arg("grad_weight"), py::arg("grad_bias"));
  m.def("readout_loss", &bind_readout_loss, py::arg("loss"), py::arg("y"), py::arg("weight"),
        py::arg("bias"), py::arg("target"), py::arg("scale"), py::arg("ignore_index"),
        py::arg("grad_weight"), py::arg("grad_bias"), py::arg("need_grad"),
        py::arg("counts") = py::none());
  m.def(
      "readout_nbytes",
      [](Index K, Index N, Index rows, bool is_double) {
        return is_double ? readout_nbytes<double>(K, N, rows) : readout_nbytes<float>(K, N, rows);
      },
      py::arg("K"), py::arg("N"), py::arg("rows"), py::arg("is_double"));
  m.def("embedding_backward", &bind_embedding_backward, py::arg("index"), py::arg("grad"),
        py::arg("grad_weight"));
}

}  // namespace fastbptt::bindings
