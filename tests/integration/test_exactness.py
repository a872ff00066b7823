from __future__ import annotations
import time
from pathlib import Path
from ansible_collections.pgdrill.pitr.tests.integration.exact_life import Life, History

def test_build(bin_dir: str, major: int, template: Path, tmp_path: Path) -> None:
    t=time.monotonic()
    Life(bin_dir, major, tmp_path, template).live()
    print("built", time.monotonic()-t)
    h = History(bin_dir, tmp_path)
    for e in h.events.values(): print(e)
    print({t: len(r) for t,r in h.oracle.records.items()})
    import subprocess
    print(subprocess.run(["du","-sh",str(tmp_path/"life/repository"),str(tmp_path/"life/primary")],capture_output=True,text=True).stdout)
