// A device guard for CUDA that does nothing, as torch's CPU build has none: with it, indexing and copies of fake CUDA
// tensors work (torch registers the same one itself where it is built for CUDA and no GPU is there).
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>)
}
