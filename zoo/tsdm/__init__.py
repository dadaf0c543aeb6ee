"""TSDM-Fusion: a student that fuses bad images well, a teacher that fuses clean ones, and their training.

The teacher learns to fuse clean grey pairs without labels. Its work on a sharpened pair, with the colours of the
visible image, is what the student has to make of the same pair after the degradation model (utils/data/degradation.py)
has damaged both images; first by an L1 loss, then against a discriminator. The student alone fuses afterwards.

    python train.py --system tsdm --recipe teacher
    python train.py --system tsdm --recipe student --init runs/TEACHER/TSDM-Fusion_IVF.pth

A file of weights holds one of the two networks, and the system fuses with the one that was loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.common import InputError
from utils.data.degradation import INFRARED, VISIBLE, degrade_pair, unsharp_mask
from utils.inference.checkpoint import load_one_of, save_checkpoint
from utils.training.distributed import is_first
from zoo import Batch, CheckedOptions, Pass, Stage, System, option
from zoo.tsdm.losses import (
    Content,
    charbonnier_loss,
    laplacian_loss,
    luma,
    relativistic_loss,
    ssim,
    with_luma,
)
from zoo.tsdm.networks import WINDOW, Discriminator, Student, Teacher

TRAINABLE = ("teacher", "student")


class Lesson(NamedTuple):
    """What the student is trained on: degraded images and what it should make of them, in [0, 1] or near it."""

    vis: Tensor  # (B, 3, H, W)
    ir: Tensor  # (B, 1, H, W)
    target: Tensor  # (B, 3, H, W)


@dataclass(frozen=True)
class Options(CheckedOptions):
    """Training options of TSDM-Fusion; the defaults are those of the published code, without its slips."""

    stage: str = option("teacher", "which network to train; the student learns from the teacher given by --init",
                        choices=TRAINABLE)  # fmt: skip
    teacher_epochs: int = option(50, "epochs of the teacher", low=0)
    student_epochs: int = option(79, "epochs of the student by the L1 loss alone", low=0)
    adversarial_epochs: int = option(71, "epochs of the student against the discriminator, after those", low=0)
    ssim_weight: float = option(0.001, "teacher: weight of the dissimilarities", low=0)
    laplacian_weight: float = option(0.5, "teacher: weight of the differences of Laplacians", low=0)
    l1_weight: float = option(0.5, "teacher: weight of the differences", low=0)
    charbonnier_weight: float = option(10.0, "student, adversarial: weight of the difference to the target", low=0)
    content_weight: float = option(1.0, "student, adversarial: weight of the difference of VGG features", low=0)
    adversarial_weight: float = option(0.005, "student, adversarial: weight of the relativistic loss", low=0)
    discriminator_rate: float = option(0.2, "learning rate of the discriminator, times that of the student", above=0)
    vgg_weights: str = option("", "torchvision's ImageNet weights of VGG19, a file; empty: no difference of features")
    degrade_vis: str = option("", "ranges of the degradation that differ, such as 'contrast=0.5:0.9 noise_level=2:9'")
    degrade_ir: str = option("", "the same for infrared images")
    legacy: bool = option(False, "with the published slips: the teacher is paid for dissimilarity, the student for "
                          "helping the discriminator, targets may leave [0, 1], see also Ranges.legacy")  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        VISIBLE.changed(self.degrade_vis), INFRARED.changed(self.degrade_ir)


class TSDMFusion(System, nn.Module):
    """The whole system: teacher, student, and the discriminator that only training needs."""

    label = "TSDM-Fusion"
    weights = {"ivf": ("TSDM-Fusion_student.pth",), "mif": ()}
    other_weights = ("TSDM-Fusion_teacher.pth",)  # --init of a student
    takes_colour = True
    whole_bytes = 4700  # measured at 320 x 256, libraries included; 2200 at 640 x 480
    normalised = False  # its images are in the range of its sources already
    smallest_patch = 16  # VGG19 halves it four times; the window of the SSIM loss has 11
    smallest_batch = 2  # the discriminator compares with a mean over the batch, and has batch norm
    Options = Options
    # The published loops, as far as they differ from CDDFuse's. With two of them, none is called "published".
    recipes = {
        "teacher": {"stage": "teacher", "batch_size": 16, "learning_rate": 5e-4, "lr_epochs": 10, "min_lr": 0.0,
                    "clip_norm": 0.0, "weight_decay": 0.01, "decoupled_weight_decay": True},
        "student": {"stage": "student", "batch_size": 6, "learning_rate": 5e-4, "lr_epochs": 30, "min_lr": 0.0,
                    "clip_norm": 0.0, "weight_decay": 0.01, "decoupled_weight_decay": True},
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.student, self.discriminator = Teacher(), Student(), Discriminator()
        # Stored with a run, so that a resumed one knows it too.
        self.register_buffer("teacher_is_given", torch.zeros((), dtype=torch.bool))
        self.in_training: str | None = None
        self.loaded: str | None = None

    @property
    def acting(self) -> str:
        """The network that fuses and is saved: the one in training, or else the one that was loaded."""
        return self.in_training or self.loaded or "student"

    def fuse(self, vis: Tensor, ir: Tensor, skip: str = "none") -> Tensor:
        """Fuses two aligned images of one size; colour stays colour.

        Args:
            vis: visible image, (B, 3, H, W) or (B, 1, H, W) in [0, 1].
            ir: infrared image, (B, 1, H, W) in [0, 1].
            skip: "none", since it has no decoder that takes an image.

        Returns:
            The shape of `vis`, in [0, 1].

        Raises:
            ValueError: other shapes, or an unknown `skip`.
        """
        if vis.ndim != 4 or vis.shape[1] not in (1, 3) or ir.shape != (len(vis), 1, *vis.shape[2:]) or not ir.numel():
            raise ValueError(
                f"sources must be (B, 1 or 3, H, W) and (B, 1, H, W) of one size, got {tuple(vis.shape)} and "
                f"{tuple(ir.shape)}"
            )
        if skip not in self.skips:
            raise ValueError(f"skip must be {', '.join(self.skips)}, got {skip!r}")
        if self.acting == "teacher":
            fused = self.teach(vis, ir)
        else:
            fused = self.padded_student(vis.expand(-1, 3, -1, -1), ir).clamp(0, 1)
            fused = fused if vis.shape[1] == 3 else luma(fused)
        return fused.clamp(0, 1).to(vis.dtype)

    def teach(self, vis: Tensor, ir: Tensor, *, clamp: bool = True) -> Tensor:
        """The teacher's luminance with the colours of the visible image; shapes as in `fuse`, not clamped.

        Args:
            vis, ir: as in `fuse`.
            clamp: keep the luminance in [0, 1] before it is coloured.
        """
        y = self.teacher(ir, luma(vis)).to(vis.dtype)
        y = y.clamp(0, 1) if clamp else y
        return y if vis.shape[1] == 1 else with_luma(vis, y)

    def padded_student(self, vis: Tensor, ir: Tensor, extra_window: bool = True) -> Tensor:
        """The student on images of any size: (B, 3, H, W) and (B, 1, H, W) -> (B, 3, H, W), not clamped.

        Borders are replicated at the bottom and at the right to whole windows. As published, a side of whole windows
        gets one more, unless `extra_window` is off.
        """
        height, width = vis.shape[2:]
        bottom, right = (WINDOW - side % WINDOW if extra_window else -side % WINDOW for side in (height, width))
        if bottom or right:
            vis, ir = (F.pad(image, (0, right, 0, bottom), mode="replicate") for image in (vis, ir))
        return self.student(ir, vis)[..., :height, :width]

    # -- training ------------------------------------------------------------------------------------------------

    def stages(self, options: Options, task: str) -> list[Stage]:
        """The teacher, or the student by L1 and then against the discriminator; both tasks are trained alike.

        A batch holds visible images (B, 3, H, W); grey ones, (B, 1, H, W), are three equal channels.

        Raises:
            FileNotFoundError, InputError: the file of VGG weights cannot be used.
        """
        self.in_training = options.stage
        if options.stage == "teacher":
            losses = self.teacher_losses(options)
            return [Stage("teacher", options.teacher_epochs, {"teacher": self.teacher}, losses)]
        student, discriminator = {"student": self.student}, {"discriminator": self.discriminator}
        prepare = self.preparation(options)

        def l1_losses(lesson: Lesson) -> dict[str, Tensor]:
            return {"total": F.l1_loss(self.on_lesson(lesson), lesson.target)}

        student_losses, discriminator_losses = self.adversarial_losses(options)
        return [
            Stage("student", options.student_epochs, student, l1_losses, prepare=prepare),
            Stage(
                "adversarial",
                options.adversarial_epochs,
                {**discriminator, **student},
                student_losses,
                passes=(
                    Pass("discriminator", discriminator, discriminator_losses),
                    Pass("student", student, student_losses),
                ),
                prepare=prepare,
                lr_scale={"discriminator": options.discriminator_rate},
            ),
        ]

    def teacher_losses(self, options: Options) -> Any:
        def losses(batch: Batch) -> dict[str, Tensor]:
            vis = luma(batch.vis)
            fused = self.teacher(batch.ir, vis).float()
            sources = {"vis": vis, "ir": batch.ir}
            similarity = {f"ssim_{name}": ssim(fused, image) for name, image in sources.items()}
            laplacian = {f"laplacian_{name}": laplacian_loss(fused, image) for name, image in sources.items()}
            l1 = {f"l1_{name}": F.l1_loss(fused, image) for name, image in sources.items()}
            similar = sum(similarity.values()) / 2
            total = options.ssim_weight * (similar if options.legacy else 1 - similar)
            total = total + options.laplacian_weight * sum(laplacian.values()) + options.l1_weight * sum(l1.values())
            return {**similarity, **laplacian, **l1, "total": total}

        return losses

    def preparation(self, options: Options) -> Any:
        """A batch and a seed -> what the student is trained on; see `zoo.Stage.prepare`."""
        changes = " legacy=1" if options.legacy else ""
        vis_ranges = VISIBLE.changed(options.degrade_vis + changes)
        ir_ranges = INFRARED.changed(options.degrade_ir + changes)

        @torch.no_grad()
        def prepare(batch: Batch, seed: Sequence[int]) -> Lesson:
            if not self.teacher_is_given:
                raise InputError(
                    "the student learns from a trained teacher: give its weights by --init; "
                    "`python train.py --system tsdm --recipe teacher` makes them"
                )
            device = batch.vis.device
            vis = batch.vis.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
            ir = batch.ir[:, 0].cpu().numpy()
            bad, clean = [], []
            for number, pair in enumerate(zip(vis, ir, strict=True)):
                bad.append(degrade_pair(*pair, (*seed, number), vis_ranges, ir_ranges))
                clean.append([unsharp_mask(image) for image in pair])
            bad_vis, bad_ir = _to_batch(bad, device)
            return Lesson(bad_vis, bad_ir, self.teach(*_to_batch(clean, device), clamp=not options.legacy))

        return prepare

    def on_lesson(self, lesson: Lesson) -> Tensor:
        return self.padded_student(lesson.vis, lesson.ir, extra_window=False).float()

    def adversarial_losses(self, options: Options) -> tuple[Any, Any]:
        """Losses of the student and of the discriminator."""
        content = None
        if options.adversarial_epochs and options.content_weight:
            if options.vgg_weights:
                content = Content(options.vgg_weights)
            elif is_first():
                print(
                    "the adversarial stage goes without its content loss: that needs the ImageNet weights of VGG19 "
                    "(vgg19-dcbb9e9d.pth of torchvision); name the file by --vgg-weights",
                    file=sys.stderr,
                )

        def student_losses(lesson: Lesson) -> dict[str, Tensor]:
            fused = self.on_lesson(lesson)
            with torch.no_grad():
                real = self.discriminator(lesson.target)
            terms = {
                "charbonnier": charbonnier_loss(fused, lesson.target),
                # As published the labels are the discriminator's own.
                "adversarial": relativistic_loss(real, self.discriminator(fused), float(options.legacy)) / 2,
            }
            total = options.charbonnier_weight * terms["charbonnier"]
            total = total + options.adversarial_weight * terms["adversarial"]
            if content:
                terms["content"] = content(fused, lesson.target)
                total = total + options.content_weight * terms["content"]
            return {**terms, "total": total}

        def discriminator_losses(lesson: Lesson) -> dict[str, Tensor]:
            with torch.no_grad():
                fused = self.on_lesson(lesson)
            return {"total": relativistic_loss(self.discriminator(lesson.target), self.discriminator(fused), 1.0)}

        return student_losses, discriminator_losses

    # -- files ---------------------------------------------------------------------------------------------------

    @property
    def published_networks(self) -> dict[str, str]:
        return {"state_dict": self.acting}

    def load_published(self, path: Path | str) -> dict[str, Any]:
        """Loads a file of the teacher or of the student, which then fuses; see `load_checkpoint`."""
        about, form = load_one_of(path, self, [{"state_dict": name} for name in TRAINABLE])
        self.loaded = form["state_dict"]
        if self.loaded == "teacher":
            self.teacher_is_given.fill_(True)
        return about

    def save(self, path: Path | str, about: dict[str, Any] | None = None, *, half: bool = False) -> None:
        """Saves the network that fuses, under `state_dict`, with keys without `module.`; see `save_checkpoint`."""
        save_checkpoint(path, self, about, half=half, prefix="")


def _to_batch(pairs: list[Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pairs of arrays (H, W, 3) and (H, W) -> (B, 3, H, W) and (B, 1, H, W)."""
    vis, ir = (torch.from_numpy(np.stack(images)).to(device) for images in zip(*pairs, strict=True))
    return vis.permute(0, 3, 1, 2).contiguous(), ir[:, None]
