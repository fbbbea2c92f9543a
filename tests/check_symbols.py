"""Fail if objects that were compiled for different instruction sets share a symbol.

    python check_symbols.py OBJECTS OBJECTS...

Each argument stands for one instruction set: an object, a static library, or several of them with
commas between. Of two definitions of one symbol the linker keeps one, for every caller; if that one
is an inline function that was compiled for AVX-512, a machine without it stops with an illegal
instruction. Exit status: 0 nothing shared, 1 shared symbols (listed on stdout), 2 a wrong call.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

# Data that a compiler emits under a name of its own; the copies are the same under all flags.
HARMLESS = re.compile(
    r"""
      DW\.ref\.__gxx_personality_v0     # where the exception personality is
    | (__asan|__ubsan|__tsan|___asan|___ubsan|___tsan).*    # marks of sanitizer builds
    """,
    re.VERBOSE,
)

# As `nm -P` prints them: undefined, and undefined weak. Every other type is a definition.
UNDEFINED = {"U", "w", "v"}


def defined_symbols(files: list[str]) -> set[str]:
    """The names that other objects can see, of all the files."""
    nm = os.environ.get("NM", "nm")
    listing = subprocess.run(
        [nm, "-P", "-g", *files], check=True, capture_output=True, text=True
    ).stdout
    symbols = set()
    for line in listing.splitlines():
        fields = line.split()
        # Other lines name the file or are empty.
        if len(fields) >= 2 and len(fields[1]) == 1 and fields[1] not in UNDEFINED:
            symbols.add(fields[0])
    return symbols


def shared_symbols(groups: list[list[str]]) -> dict[str, list[list[str]]]:
    """Symbol to the groups that define it, for all that more than one group does."""
    defined = [(group, defined_symbols(group)) for group in groups]
    shared: dict[str, list[list[str]]] = {}
    for (first, ours), (second, theirs) in itertools.combinations(defined, 2):
        for symbol in sorted(ours & theirs):
            if not HARMLESS.fullmatch(symbol):
                owners = shared.setdefault(symbol, [])
                owners += [group for group in (first, second) if group not in owners]
    return shared


def readable(symbol: str) -> str:
    if shutil.which("c++filt") is None:
        return symbol
    plain = subprocess.run(["c++filt", symbol], check=False, capture_output=True, text=True)
    return plain.stdout.strip() or symbol


def main(arguments: list[str]) -> int:
    groups = [[name for name in argument.split(",") if name] for argument in arguments]
    missing = [name for group in groups for name in group if not Path(name).is_file()]
    if not groups or not all(groups) or missing:
        what = f"no such file: {', '.join(missing)}" if missing else "wanted objects"
        print(f"check_symbols: {what}\nusage: check_symbols.py OBJECTS...", file=sys.stderr)
        return 2
    try:
        shared = shared_symbols(groups)
        counts = [len(defined_symbols(group)) for group in groups]
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or error
        print(f"check_symbols: cannot read the symbols: {detail}", file=sys.stderr)
        return 2
    if 0 in counts:
        # What cannot be read must not pass for clean.
        print(f"check_symbols: no symbols in {arguments[counts.index(0)]}", file=sys.stderr)
        return 2
    for symbol, owners in shared.items():
        print(f"{readable(symbol)} [{symbol}]")
        for group in owners:
            print(f"    in {', '.join(group)}")
    if shared:
        print(f"check_symbols: {len(shared)} symbols shared between instruction sets")
    return 1 if shared else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
