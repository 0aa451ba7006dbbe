// Without it PyTorch's CPU build refuses tensors that say "cuda" at the first operation that makes a
// device current. There is no device: making it current is doing nothing.
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>);
}
