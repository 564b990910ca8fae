"""The process of one step: `python -m benchmarks.first_hour.child STEP FOLDER KEY DEVICE [--tiny]`; or `probe`."""

import argparse
import json
import os
import platform
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from .. import records
from ..benchmark import SkippedError, WrongResultError
from .context import Context
from .plan import Finding, Step, result_text, write_whole


def probe(device: torch.device) -> dict[str, str]:
    """Device and versions, as the verdict states them."""
    found = {"device": records.name_of(device), "torch": torch.__version__, "triton": records.installed("triton")}
    found |= {"python": platform.python_version(), "cuda": torch.version.cuda or "", "hip": torch.version.hip or ""}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        found["multiprocessors"] = str(properties.multi_processor_count)
    return found


def end_with_parent() -> None:
    """End this process when the one that began it is gone, so that nothing holds the device."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def answer(step: Step, context: Context) -> tuple[str, str, Finding]:
    """Status, reason and finding of a step; nothing is raised."""
    try:
        found = step.function(context)
        context.finish()
        return "passed", "", found
    except SkippedError as why:
        return "skipped", str(why), Finding()
    except (WrongResultError, AssertionError) as wrong:
        return "failed", str(wrong) or "an assertion without words", Finding()
    except Exception as error:
        traceback.print_exc()
        return "failed", f"{type(error).__name__}: {error}", Finding()


def serve(steps: Callable[[], list[Step]], arguments: argparse.Namespace) -> None:
    """Answer one of `steps` and write its result."""
    device = torch.device(arguments.device)
    step = next(step for step in steps() if step.name == arguments.step)
    context = Context(device, arguments.folder, step.seconds, arguments.tiny)
    with ExitStack() as stack:
        if os.environ.get("TRITON_INTERPRET") == "1":
            from interpreted import quick

            stack.enter_context(quick())
        status, why, found = answer(step, context)
    seconds = time.monotonic() - context.began
    write_whole(arguments.folder / "result.json", result_text(arguments.key, status, why, seconds, found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step")
    parser.add_argument("folder", type=Path)
    parser.add_argument("key")
    parser.add_argument("device")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    end_with_parent()
    if arguments.step == "probe":
        write_whole(arguments.folder / "probe.json", json.dumps(probe(torch.device(arguments.device))))
        return
    from .steps import declared  # imports kernels, which a probe does without

    serve(lambda: declared(small=arguments.tiny), arguments)


if __name__ == "__main__":
    main()
