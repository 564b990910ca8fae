"""Consistency distillation of a `VideoDiT`: a student that jumps along the teacher's paths samples in a few steps.

Song et al., "Consistency Models" (arXiv:2303.01469, algorithm 2), on the paths of a guided teacher (Luo et al., "Latent
Consistency Models", arXiv:2310.04378, §4.2), with the student's own weights as the target and the pseudo-Huber distance
of Song and Dhariwal (arXiv:2310.14189, §3.2 and §3.3).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..video.flow import add_noise, shift_time, spread_time
from .video import VideoDiffusionTask

HUBER = 0.00054  # of the root mean square of a difference (arXiv:2310.14189, §3.3, whose norm is not a mean)


def clean_video(noisy: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """`x_t - t v`: where a straight path at time t ends."""
    return noisy - spread_time(t, noisy) * velocity


def huber_distance(prediction: Tensor, target: Tensor, *, weight: Tensor) -> Tensor:
    """`sqrt(mean square + c²) - c` of each video, the mean over videos.

    Args:
        prediction, target: `[B, C, T, H, W]`.
        weight: `[B]` or `[B, F]`, 0 or 1; 0 leaves a video or a group of frames out.
    """
    counts = spread_time(weight.float(), target).expand(-1, -1, target.shape[2], -1, -1)  # [B, 1, T, 1, 1]
    square = ((prediction - target).square().mean(dim=(1, 3, 4), keepdim=True) * counts).sum(dim=(1, 2, 3, 4))
    frames = counts.sum(dim=(1, 2, 3, 4))
    distance = (square / frames.clamp_min(1) + HUBER**2).sqrt() - HUBER
    videos = (frames > 0).float()
    return (distance * videos).sum() / videos.sum().clamp_min(1)


class ConsistencyTask(VideoDiffusionTask):
    """Trains a `VideoDiT` to say, anywhere on a path of its teacher, where the path ends.

    The path is cut into intervals of equal shares of the sampler's time. At the noisy end of a random interval the
    student has to say what it says itself, without a gradient, at the other end, to which the teacher leads; at the
    last interval that is the clean video. Samples then need one to four steps and no guidance.

    Args:
        intervals: at the start and at the end of training, growing by equal factors: few carry what is known of nearly
            clean videos to noise soon, many follow the path closely. Evaluation has those of the end.
        teacher_guidance: scale of classifier-free guidance that the path is made with; 1: none.
        options: of `VideoDiffusionTask`; `teacher` is needed, times are those of the intervals.

    Raises:
        ValueError: see `VideoDiffusionTask`; or no teacher, or intervals or a scale out of range.
    """

    sampling: ClassVar = {"stochastic_sampling": True}  # after each jump new noise, of the next level

    def __init__(self, *, intervals: tuple[int, int] = (4, 32), teacher_guidance: float = 1.0, **options: Any):
        first, last = (int(count) for count in intervals)
        if not 1 <= first <= last:
            raise ValueError(f"task.intervals={list(intervals)} must be two counts, the second not less than the first")
        if teacher_guidance < 1:
            raise ValueError(f"task.teacher_guidance={teacher_guidance} must be 1, no guidance, or more")
        if options.get("teacher") is None:
            raise ValueError("task.teacher=FOLDER is needed: a VideoDiT, a pipeline or a run whose paths are followed")
        if options.get("time_per", "video") != "video":
            raise ValueError("task.time_per=frame has no path from noise to data: pass task.time_per=video")
        super().__init__(**options)
        if teacher_guidance > 1 and self.conditioning is None:
            raise ValueError(f"task.teacher_guidance={teacher_guidance} needs model.conditioning")
        self.intervals, self.teacher_guidance = (first, last), teacher_guidance

    def count_intervals(self) -> int:
        """Intervals of the path at this step of training."""
        first, last = self.intervals
        if not self.training or first == last:
            return last
        length = self.trainer.estimated_stepping_batches
        if length == float("inf"):
            raise ValueError("task.intervals grow until training ends: set trainer.max_epochs or trainer.max_steps")
        return round(first * (last / first) ** min(self.global_step / length, 1))

    def draw_time(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Times of noisy ends of intervals, and what their errors count; see `VideoDiffusionTask.draw_time`."""
        count = self.count_intervals()
        ends = torch.randint(1, count + 1, (len(video),), device=video.device)
        return self.give_frames(shift_time(ends.float() / count, self.shift), video)

    def follow(self, noisy: Tensor, t: Tensor, nearer: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """The point of the teacher's path at times `nearer`, from the point at times `t` by one step."""
        assert self.teacher is not None
        timestep = self.process.timestep(t)
        velocity = self.teacher(noisy, timestep, **condition)
        if self.teacher_guidance > 1:
            unguided = self.teacher(noisy, timestep, **self.null_condition(condition))
            velocity = unguided + self.teacher_guidance * (velocity - unguided)
        return noisy + spread_time(nearer - t, noisy) * velocity

    def jump(self, noisy: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """Where the path ends, says the student."""
        assert self.model is not None
        velocity = self.model(noisy, self.process.timestep(t), **condition).sample
        return clean_video(noisy, velocity.float(), t)

    def loss(self, video: Tensor, noise: Tensor, t: Tensor, weight: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """Distance of what the student says at both ends of an interval; frames that are given have time 0 at both."""
        noisy = add_noise(video, noise, t)
        count = self.count_intervals()
        ends = (shift_time(t, 1 / self.shift) * count).round()  # as drawn: exact times at both ends
        nearer = shift_time((ends - 1).clamp_min(0) / count, self.shift)
        with torch.no_grad():
            target = self.jump(self.follow(noisy, t, nearer, condition), nearer, condition)
        return huber_distance(self.jump(noisy, t, condition), target, weight=weight)
