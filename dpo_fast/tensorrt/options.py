"""What a user can choose about the plans that are built for a bundle."""

from dataclasses import dataclass

from dpo_fast.errors import UsageError
from dpo_fast.tensorrt.plans import Package

# Compute capabilities that TensorRT-RTX builds for on any machine, by its enumeration `ComputeCapability`. SM75 is not
# among them: it has neither float32 products, which the head needs, nor bfloat16.
RTX_TARGETS = ("sm80", "sm86", "sm89", "sm120", "sm121")


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How plans are built.

    Attributes:
        targets: compute capabilities, such as ("sm86", "sm89"); none takes this machine's GPU (tensorrt), or all that
            there are (tensorrt-rtx).
        profile_from: a data set, whose rows' lengths the optimisation profiles are chosen from.
        profile_split: its split.
        profiles: how many there are at most, beside one for the longest rows.
        workspace_gib: memory that the builder's kernels may use, in GiB; None leaves it to the builder.
        refittable: whether new weights can be put into the plans; None: where the package can (tensorrt).
        version_compatible: whether later versions of TensorRT can run the plans.
        hardware_compatible: whether other GPUs than this machine's can, from Ampere on.
    """

    targets: tuple[str, ...] = ()
    profile_from: str | None = None
    profile_split: str | None = None
    profiles: int = 4
    workspace_gib: float | None = None
    refittable: bool | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False

    def check(self, package: Package) -> None:
        """Refuse what a package's builder cannot do.

        Raises:
            UsageError: with what it can.
        """
        if not 1 <= self.profiles <= 16:
            raise UsageError(f"--profiles {self.profiles} must be between 1 and 16")
        if self.workspace_gib is not None and not 0 < self.workspace_gib <= 1024:
            raise UsageError(f"--workspace {self.workspace_gib:g} must be above 0 GiB, and 1024 at most")
        if self.profile_split is not None and self.profile_from is None:
            raise UsageError(f"--profile-split {self.profile_split} goes with --profile-from")
        if package == "tensorrt":
            if self.targets:
                raise UsageError(
                    f"--target {','.join(self.targets)}: TensorRT builds for the GPU of the machine that it runs on; "
                    "leave it out and build there, or take a recipe tensorrt-rtx-…"
                )
            return
        for target in self.targets:
            if target == "sm75":
                raise UsageError(
                    "--target sm75: has no float32 products in TensorRT-RTX, which the head needs; "
                    f"choose from {', '.join(RTX_TARGETS)}"
                )
            if target not in RTX_TARGETS:
                raise UsageError(
                    f"--target {target}: TensorRT-RTX builds for {', '.join(RTX_TARGETS)}; for other GPUs, such as "
                    "Hopper's sm90, take a recipe tensorrt-… and build on that machine"
                )
        for given, name in (
            (self.version_compatible, "--version-compatible"),
            (self.hardware_compatible, "--hardware-compatible"),
        ):
            if given:
                raise UsageError(f"{name}: TensorRT-RTX has no such plans; name the GPUs with --target")
