// A device guard for CUDA that does nothing, for a torch without CUDA: its Python bindings ask for one as they index.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace c10::impl {
static NoOpDeviceGuardImpl<DeviceType::CUDA> simulated;
static DeviceGuardImplRegistrar registrar(DeviceType::CUDA, &simulated);
}  // namespace c10::impl
