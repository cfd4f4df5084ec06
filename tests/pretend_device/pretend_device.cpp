// A device for tests on machines without an accelerator: tensors in host memory that say they lie elsewhere. Every
// operator runs on the CPU, on copies; one that mixes devices, as no real accelerator would allow, is an error.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/InferSize.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <set>
#include <string>

namespace {

using at::Tensor;
using c10::SymIntArrayRef;

constexpr auto kPretend = c10::DeviceType::PrivateUse1;
const c10::Device device(kPretend, 0);

// --- What torch asks of a device: memory, streams, random numbers -----------------------------------------------------

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* start = nullptr;
    if (bytes && posix_memalign(&start, 64, bytes)) throw std::bad_alloc();
    return {start, start, &std::free, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};

Memory memory;
REGISTER_ALLOCATOR(kPretend, &memory);

c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, device); }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kPretend; }
  c10::Device exchangeDevice(c10::Device) const override { return device; }
  c10::Device getDevice() const override { return device; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isAvailable() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isPinnedPtr(const void*) const override { return false; }
  at::Device getDeviceFromPtr(void*) const override { return device; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::kCPU); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto larger = memory.allocate(bytes);
    std::memcpy(larger.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(larger));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

bool float64_allowed = true;

c10::ScalarType allowed(std::optional<at::ScalarType> dtype) {
  const auto known = c10::dtype_or_default(dtype);
  TORCH_CHECK_TYPE(float64_allowed || known != at::kDouble, "Cannot convert to float64: the device has none");
  return known;
}

// --- Operators that make tensors, views of tensors, and copies between devices ------------------------------------------

Tensor empty(SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic_symint(size, &memory, keys, allowed(dtype), format);
}

Tensor empty_strided(SymIntArrayRef size, SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_symint_generic(size, stride, &memory, keys, allowed(dtype));
}

// The same memory as a tensor on the CPU.
Tensor on_host(const Tensor& tensor) {
  if (tensor.device().is_cpu()) return tensor;
  void* start = tensor.numel() ? tensor.data_ptr() : nullptr;
  auto options = tensor.options().device(at::kCPU).requires_grad(false);
  auto result = at::from_blob(start, tensor.sizes(), tensor.strides(), options);
  if (tensor.is_conj()) result._set_conj(true);
  if (tensor.is_neg()) result._set_neg(true);
  return result;
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  on_host(to).copy_(on_host(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

const Tensor& resize(const Tensor& self, SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  if (sizes == self.sizes()) return self;
  const size_t bytes = (self.storage_offset() + c10::multiply_integers(sizes)) * self.dtype().itemsize();
  if (bytes > self.storage().nbytes()) at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(self.storage(), bytes);
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  if (format && *format != at::MemoryFormat::Preserve) self.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  return self;
}

Tensor as_strided(const Tensor& self, SymIntArrayRef size, SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  std::optional<int64_t> start;
  if (offset) start = offset->expect_int();
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}

Tensor reshape_alias(const Tensor& self, SymIntArrayRef size, SymIntArrayRef stride) {
  return as_strided(self, size, stride, std::nullopt);
}

Tensor view(const Tensor& self, SymIntArrayRef size) {
  const auto sizes = at::infer_size_dv(C10_AS_INTARRAYREF_SLOW(size), self.numel());
  const auto stride = at::detail::computeStride(self.sizes(), self.strides(), sizes);
  TORCH_CHECK(stride.has_value(), "view size is not compatible with input tensor's size and stride");
  return at::native::as_strided_tensorimpl(self, sizes, *stride, std::nullopt);
}

Tensor unfold(const Tensor& self, int64_t dim, int64_t size, int64_t step) {
  return at::native::unfold(self, dim, size, step);
}

Tensor& set_storage_offset(Tensor& self, at::Storage storage, c10::SymInt offset, SymIntArrayRef size,
                           SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(storage);
  impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage storage) {
  const int64_t entries = storage.nbytes() / self.dtype().itemsize();
  return self.set_(storage, 0, {entries}, {1});
}

Tensor& set_tensor(Tensor& self, const Tensor& other) {
  return self.set_(other.storage(), other.storage_offset(), other.sizes(), other.strides());
}

at::Scalar item(const Tensor& self) { return on_host(self).item(); }

// --- Convolutions, which torch passes to devices of others in this form -------------------------------------------------

void expect_same_device(const Tensor& one, const Tensor& other) {
  TORCH_CHECK(one.device() == other.device(), "Expected all tensors to be on the same device, but found ",
              one.device(), " and ", other.device());
}

Tensor convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding,
                   int64_t groups) {
  expect_same_device(x, weight);
  std::optional<Tensor> shift;
  if (bias && bias->defined()) {
    expect_same_device(x, *bias);
    shift = on_host(*bias);
  }
  return at::convolution(on_host(x), on_host(weight), shift, stride, padding, dilation, transposed, output_padding,
                         groups).to(device);
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gradient, const Tensor& x, const Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups,
    std::array<bool, 3> wanted) {
  expect_same_device(x, weight);
  expect_same_device(x, gradient);
  const std::vector<int64_t> bias_size{gradient.size(1)};
  const auto [to_x, to_weight, to_bias] = at::convolution_backward(
      on_host(gradient), on_host(x), on_host(weight), at::OptionalIntArrayRef(bias_size), stride, padding, dilation,
      transposed, output_padding, groups, wanted);
  const auto back = [](const Tensor& tensor) { return tensor.defined() ? tensor.to(device) : tensor; };
  return {back(to_x), back(to_weight), back(to_bias)};
}

// --- Batch norm, whose schema does not say that it changes the running statistics ---------------------------------------

std::tuple<Tensor, Tensor, Tensor> batch_norm(const Tensor& x, const std::optional<Tensor>& weight,
                                              const std::optional<Tensor>& bias, const std::optional<Tensor>& mean,
                                              const std::optional<Tensor>& variance, bool training, double momentum,
                                              double eps) {
  const auto host = [&x](const std::optional<Tensor>& tensor) -> std::optional<Tensor> {
    if (!tensor || !tensor->defined()) return std::nullopt;
    expect_same_device(x, *tensor);
    return on_host(*tensor);
  };
  const auto [y, batch_mean, inverse_deviation] = at::native_batch_norm(
      on_host(x), host(weight), host(bias), host(mean), host(variance), training, momentum, eps);
  return {y.to(device), batch_mean.to(device), inverse_deviation.to(device)};
}

// --- All other operators ------------------------------------------------------------------------------------------------

// Index tensors may lie on the CPU on every device.
const std::set<std::string> may_mix = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_",
                                       "aten::_unsafe_index"};

void expect_one_device(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  const auto& name = op.schema().name();
  if (may_mix.count(name)) return;
  const auto check = [&](const Tensor& tensor) {
    TORCH_CHECK(!tensor.defined() || tensor.device() == device || tensor.dim() == 0,
                "Expected all tensors to be on the same device, but found ", device, " and ", tensor.device(), " in ",
                name);
  };
  const auto count = op.schema().arguments().size();
  for (auto value = stack.end() - count; value != stack.end(); ++value) {
    if (value->isTensor()) check(value->toTensor());
    if (value->isTensorList()) {
      for (const Tensor& tensor : value->toTensorList()) check(tensor);
    }
    if (value->isOptionalTensorList()) {
      for (const std::optional<Tensor>& tensor : value->toOptionalTensorList()) {
        if (tensor) check(*tensor);
      }
    }
  }
}

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  expect_one_device(op, *stack);
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>()); }

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("resize_", &resize);
  m.impl("as_strided", &as_strided);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("view", &view);
  m.impl("unfold", &unfold);
  m.impl("set_.source_Storage_storage_offset", &set_storage_offset);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("_local_scalar_dense", &item);
  m.impl("convolution_overrideable", &convolution);
  m.impl("native_batch_norm", &batch_norm);
  m.impl("convolution_backward_overrideable", &convolution_backward);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("allow_float64", [](bool allow) { float64_allowed = allow; });
  m.def("register_hooks", [] { at::RegisterPrivateUse1HooksInterface(new Hooks()); });
}
