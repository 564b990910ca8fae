"""Poses: metrics, skeletons with rigid bones, a lifter without places in time."""

import pytest
import torch
from foveal.layers.convolved import ConvolvedAttention
from foveal.zoo.data.skeletons import BONES, PARENTS, Skeletons, move, turn
from foveal.zoo.pose import PoseLifter, aligned, joint_errors, velocity_errors


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_bones_keep_their_lengths_and_move_smoothly():
    joints = move(20, swing=0.3)
    assert joints.shape == (20, 17, 3) and not joints[:, 0].any()
    for joint, parent in enumerate(PARENTS[1:], start=1):
        length = (joints[:, joint] - joints[:, parent]).norm(dim=-1)
        torch.testing.assert_close(length, torch.tensor(BONES[joint]).norm().expand(20), rtol=1e-4, atol=1e-5)
    assert 0 < velocity_errors(joints[None], torch.zeros_like(joints[None])) < 0.1
    still = move(1, swing=0.0)[0]
    for side in (3, 6):  # ankles lie behind the knees and wrists before the elbows, however the camera stands
        front = still[13] - still[12] - (still[12] - still[11]) / 2
        assert (still[side] - still[side - 1])[[0, 2]] @ front[[0, 2]] < -0.01
    turned = turn(torch.tensor([0.0, torch.pi / 2, 0.0]))
    torch.testing.assert_close(turned @ torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 0, -1]), rtol=0, atol=1e-6)


def test_sequences():
    data = [Skeletons(frames=5, train_length=4, batch_size=4, seed=s) for s in (0, 1)]
    for some in data:
        some.setup()
    image, space, _ = next(iter(data[0].train_dataloader()))
    assert image.shape == (4, 5, 17, 2) and torch.equal(image, space[..., :2])
    assert torch.equal(data[0].datasets["test"][1], data[1].datasets["test"][1])
    assert not torch.equal(data[0].datasets["test"][1], data[0].datasets["val"][1])
    with pytest.raises(ValueError, match=r"data\.frames=1"):
        Skeletons(frames=1)


def test_alignment_undoes_similarity_transforms_and_no_reflection():
    target = torch.randn(2, 3, 17, 3).double()
    rotation = turn(torch.randn(2, 3, 1, 3).double())[:, :, 0]
    moved = 0.7 * target @ rotation.mT + torch.randn(2, 3, 1, 3).double()
    torch.testing.assert_close(aligned(moved, target), target)
    mirrored = target * torch.tensor([-1.0, 1, 1])
    assert joint_errors(aligned(mirrored, target), target).min() > 0.1
    worse = target + 0.1 * torch.randn_like(target)
    assert (joint_errors(aligned(worse, target), target) < joint_errors(worse, target)).all()
    torch.testing.assert_close(joint_errors(target + torch.tensor([3.0, 4, 0]), target), torch.full((2,), 5.0).double())


def test_frame_blocks_know_no_places():
    """A sequence that is moved by frames moves the result, away from its ends."""
    model = PoseLifter(joints=4, frames=30, dim=8, joint_depth=1, frame_depth=1, num_heads=2).eval()
    block, x = model.frame_blocks[0], torch.zeros(1, 30, 32)
    x[:, 10:14] = torch.randn(1, 4, 32)
    with torch.no_grad():
        torch.testing.assert_close(block(x.roll(5, 1))[:, 8:26], block(x).roll(5, 1)[:, 8:26])
    model(torch.randn(2, 30, 4, 2)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="num_heads=3"):
        ConvolvedAttention(8, num_heads=3)
