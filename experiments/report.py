"""Makes the report of a sweep again, from the results.json in its directory.

python -m experiments.report runs/truncation_sweep
"""

import json
import pathlib
import sys

from tbptt_jax import study
from tbptt_jax.study.process import lock
from tbptt_jax.study.process.writing import plain

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("report: give the directory that has the results.json, as in runs/truncation_sweep.")
    place = pathlib.Path(sys.argv[1])
    try:
        results = json.loads((place / "results.json").read_text())
        lock.take(place)
        study.report(place, results)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(plain(f"report: {error}"))
    finally:
        lock.release()
