// The hooks of one of torch's own device types, DRIVETRAIN_TYPE: torch has an interface and a registry
// for each, by its name. Compiled for the types that are asked for; the header comes by an option.

#include <memory>

#include "../hooks.h"

#define JOIN_(left, right) left##right
#define JOIN(left, right) JOIN_(left, right)
#define TEXT_(name) #name
#define TEXT(name) TEXT_(name)

namespace drivetrain_sim {
namespace {

using Interface = at::JOIN(DRIVETRAIN_TYPE, HooksInterface);
using Arguments = at::JOIN(DRIVETRAIN_TYPE, HooksArgs);

struct NamedHooks final : Hooks<Interface> {
  bool JOIN(has, DRIVETRAIN_TYPE)() const override {
    return true;
  }
};

struct Registration {
  Registration() {
    at::JOIN(DRIVETRAIN_TYPE, HooksRegistry)()->Register(
        TEXT(JOIN(DRIVETRAIN_TYPE, Hooks)),
        [](Arguments) -> std::unique_ptr<Interface> { return std::make_unique<NamedHooks>(); });
  }
} g_registration;

} // namespace
} // namespace drivetrain_sim
