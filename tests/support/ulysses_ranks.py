"""Two ranks share the tokens of a Wan transformer (Ulysses); each prints whether dense and sparse equal one process."""

import diffusers
import torch
import torch.distributed as dist
from foveal.zoo import accelerate
from generators import build, run

torch.accelerator.device_count = lambda: 1  # diffusers divides by it, also on CPU
dist.init_process_group("gloo")
model, inputs = build("wan", batch=2)
dense = run(model, inputs)
with accelerate(model, {"window": 3}):
    sparse = run(model, inputs)
model.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=2))
torch.testing.assert_close(run(model, inputs), dense)
with accelerate(model, {"window": 3}) as acceleration:
    torch.testing.assert_close(run(model, inputs), sparse)
    assert len(acceleration.sparse) == 2 and not acceleration.dense
dist.destroy_process_group()
print("equal")
