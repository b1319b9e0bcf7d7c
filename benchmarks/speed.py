"""How fast, and how large, beside others: measured and written to ``docs/speed.md`` and ``docs/speed.png`` by one command.

    python -m benchmarks.speed
    python -m benchmarks.speed --parts=window,study --seconds=5

Some of the parts are only printed; all of them, the default, write the document as a whole.
"""

import datetime
import io
import os
import pathlib
import platform
from importlib.metadata import PackageNotFoundError, version

import jax
from absl import flags
from matplotlib import pyplot as plt

from benchmarks import char_lm, cost, regularised, study, window
from benchmarks.turns import Section, prepare
from experiments import launch

PARTS = {
    "window": window.lstm,
    "gru": window.gru,
    "regularised": regularised.measure,
    "char_lm": char_lm.measure,
    "study": study.measure,
    "memory": cost.memory,
    "cost": cost.cost,
}
PACKAGES = ("jax", "flax", "optax", "torch", "keras", "dm-haiku")
_PARTS = flags.DEFINE_list("parts", list(PARTS), f"What to measure, of {', '.join(PARTS)}.")
_SECONDS = flags.DEFINE_float(
    "seconds", 10.0, "Time to measure each comparison for, besides what it takes to compile.", lower_bound=0.0
)
_DOCS = flags.DEFINE_string("docs", "docs", "Where speed.md and speed.png go.")


def machine() -> str:
    cpu = pathlib.Path("/proc/cpuinfo")
    names = (
        [line.split(": ")[1] for line in cpu.read_text().splitlines() if "model name" in line] if cpu.exists() else []
    )
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.machine()}, JAX's device: {jax.devices()[0].device_kind}"


def installed(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def document(sections: dict[str, Section]) -> str:
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    head = f"""# Speed and memory

`python -m benchmarks.speed` (needs the extra `bench`) made this page on {today}: {machine()}; Python
{platform.python_version()}, {", ".join(map(installed, PACKAGES))}. Float32. Sides of a comparison take turns call by call, warmed up,
and a call ends when its result is there; a ratio is one of medians. All JAX programs, the peers' too, have vectors of 512 bits, as the
launches have (`--xla_cpu_prefer_vector_width=512`).

![Time of a train window, of training a character model and of the study; memory and time by the stream's length](speed.png)
"""
    return head + "".join(
        f"\n## {section.title}\n\n`python -m benchmarks.speed --parts={part}`\n\n{section.text}\n"
        for part, section in sections.items()
    )


def picture(sections: dict[str, Section]) -> bytes:
    figure, axes = plt.subplot_mosaic(
        [["window", "window", "regularised"], ["gru", "gru", "char_lm"], ["study", "memory", "cost"]],
        figsize=(16, 13),
        layout="constrained",
    )
    for part, section in sections.items():
        section.draw(axes[part])
    image = io.BytesIO()
    figure.savefig(image, dpi=120)
    return image.getvalue()


def main() -> None:
    unknown = [part for part in _PARTS.value if part not in PARTS]
    if unknown or not _PARTS.value:
        raise ValueError(f"--parts has {', '.join(unknown) or 'nothing'}: give some of {', '.join(PARTS)}.")
    docs = launch.workdir(_DOCS.value)
    prepare()
    sections = {part: measure(_SECONDS.value) for part, measure in PARTS.items() if part in _PARTS.value}
    text = document(sections)
    print(text)
    if len(sections) == len(PARTS):
        for name, content in {"speed.png": picture(sections), "speed.md": text.encode()}.items():
            part = docs / f".{name}.part"
            part.write_bytes(content)
            part.replace(docs / name)
        print(f"Written to {docs}: speed.md, speed.png")


if __name__ == "__main__":
    launch.run(main)
