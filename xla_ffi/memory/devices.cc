#include "memory/devices.h"

#include <cctype>
#include <string_view>
#include <utility>

#include "memory/cuda_driver.h"
#include "memory/cuda_link.h"
#include "memory/host_driver.h"
#include "memory/pinned_driver.h"

namespace ellm {
namespace {

constexpr std::string_view kCudaPrefix = "cuda:";
constexpr size_t kMaxDigits = 4;

// The same result of another type.
template <class To, class From>
Result<To> as(Result<From> from) {
  if (!from.ok()) return from.status();
  return To(std::move(from.value()));
}

}  // namespace

Result<DeviceName> parse_device(const std::string& name) {
  if (name == "cpu") return DeviceName{};
  const std::string_view view(name);
  if (view.substr(0, kCudaPrefix.size()) == kCudaPrefix) {
    const std::string digits(view.substr(kCudaPrefix.size()));
    bool number = !digits.empty() && digits.size() <= kMaxDigits;
    for (const char c : digits) number &= std::isdigit(static_cast<unsigned char>(c)) != 0;
    if (number) return DeviceName{true, std::stoi(digits)};
  }
  return Status(Code::kInvalid,
                "there is no device \"" + name + "\"; use \"cpu\", \"cuda:0\", \"cuda:1\", ...");
}

Result<std::shared_ptr<CudaDevice>> open_cuda(int ordinal) {
  const Result<const CudaApi*> api = load_cuda();
  if (!api.ok()) return api.status();
  return CudaDevice::Open(*api.value(), ordinal);
}

Result<std::shared_ptr<Driver>> open_device_memory(const std::string& device) {
  const Result<DeviceName> name = parse_device(device);
  if (!name.ok()) return name.status();
  if (!name.value().is_cuda) return as<std::shared_ptr<Driver>>(HostDriver::Create());
  auto cuda = open_cuda(name.value().ordinal);
  if (!cuda.ok()) return cuda.status();
  return as<std::shared_ptr<Driver>>(CudaDriver::Create(std::move(cuda.value())));
}

Result<std::shared_ptr<Driver>> open_host_memory(const std::string& device) {
  const Result<DeviceName> name = parse_device(device);
  if (!name.ok()) return name.status();
  auto host = as<std::shared_ptr<Driver>>(HostDriver::Create());
  if (!host.ok() || !name.value().is_cuda) return host;
  auto cuda = open_cuda(name.value().ordinal);
  if (!cuda.ok()) return cuda.status();
  return std::shared_ptr<Driver>(
      std::make_shared<PinnedDriver>(std::move(host.value()), std::move(cuda.value())));
}

Result<std::unique_ptr<CopyLink>> open_link(const std::string& device) {
  const Result<DeviceName> name = parse_device(device);
  if (!name.ok()) return name.status();
  if (!name.value().is_cuda) return host_link();
  auto cuda = open_cuda(name.value().ordinal);
  if (!cuda.ok()) return cuda.status();
  return as<std::unique_ptr<CopyLink>>(CudaLink::Create(std::move(cuda.value())));
}

}  // namespace ellm
