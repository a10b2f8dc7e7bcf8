"""The command `ultraflux sign`, and signing what `ultraflux generate` has made."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.commands.command_line import fail, project_root, refusing, why_no_file

if TYPE_CHECKING:
    from components.files.signatures import SigningKey

EPILOG = """Examples:

  ultraflux sign data/generate/images --out signed

  ULTRAFLUX_SIGNING_KEY=key.pem ULTRAFLUX_SIGNING_CHAIN=chain.pem ultraflux sign outputs/a.png

Outputs of stages are signed in a copy, since a manifest has random parts and stages repeat bit by
bit. Pictures of a folder that this project did not make are left out, and named. Without a key of
your own a development key is made at first use: it shows that a picture was not changed since, not
who made it. `ultraflux verify PICTURE` checks."""

PICTURES = {".png", ".jpg", ".jpeg", ".webp"}


def _pictures(paths: list[Path]) -> dict[Path, bool]:
    """The files that are named, and those of folders that are; whether each was named itself.

    Raises:
        typer.Exit: no file, a folder without pictures, or two copies of one name; one line.
    """
    found: dict[str, Path] = {}
    for path in paths:
        files = [path]
        if path.is_dir():
            files = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES)
            if not files:
                raise fail(f"{path}: no picture in it ({', '.join(sorted(PICTURES))})")
        for file in files:
            if not file.is_file():
                raise fail(f"{file}: {why_no_file(file)}")
            if file.name in found:
                raise fail(
                    f"{found[file.name]} and {file} would both be {file.name} in --out; sign them "
                    "into folders of their own"
                )
            found[file.name] = file
    return {file: file in paths for file in found.values()}


def _refuse_sources(found: Iterable[Path], out: Path) -> None:
    """Refuse a folder for copies where a copy would replace its picture.

    Raises:
        typer.Exit: one line was printed.
    """
    for file in found:
        if file.parent.resolve() == out.resolve():
            raise fail(f"--out {out}: {file} lies there itself; choose another folder for copies")


def _made_here(found: dict[Path, bool]) -> dict[Path, dict[str, str]]:
    """What can be signed and its fields, known before anything is; the rest of folders is said.

    Raises:
        NotSignable: a file that was named was not made by this project, or nothing was.
    """
    from components.files.content_credentials import NotSignable

    ours: dict[Path, dict[str, str]] = {}
    others: list[str] = []
    for file, named in found.items():
        try:
            ours[file] = made_with(file)
        except ValueError as problem:
            if named:
                raise
            others.append(f"left out {file.name}: {str(problem).removeprefix(f'{file}: ')}")
    for line in others:
        print(line, file=sys.stderr)
    if not ours:
        raise NotSignable(f"none of {len(others)} pictures was made by this project")
    return ours


def sign(
    paths: Annotated[list[Path], typer.Argument(help="Pictures, or folders of pictures.")],
    out: Annotated[Path, typer.Option(help="Folder for the signed copies.")] = Path("signed"),
) -> None:
    """Write copies of generated pictures with a signed C2PA manifest of where they come from."""
    root = project_root()
    with refusing(ValueError):
        pictures = _pictures(paths)
        _refuse_sources(pictures, out)
        found = _made_here(pictures)
        signer = Signer(root)
        out.mkdir(parents=True, exist_ok=True)
        for file, fields in found.items():
            signer.sign(file, out / file.name, fields)
            print(out / file.name)
    print(f"signed with {signer.key.title}")


def key_folder(root: Path) -> Path:
    """Where the development key of a clone lies."""
    from flows.tracking.tier import services_dir

    return services_dir(root) / "signing"


def made_with(source: Path) -> dict[str, str]:
    """The fields that a picture of this project carries.

    Raises:
        NotSignable: one of somebody else, or without its metadata.
        ValueError: no picture.
    """
    from components.files.content_credentials import NotSignable
    from components.generation.image_metadata import read_metadata

    fields = read_metadata(source)
    if "ultraflux_key" not in fields:
        raise NotSignable(
            f"{source}: not made by this project, or its metadata was removed: nothing is known "
            "that could be signed"
        )
    return fields


def is_signed(path: Path) -> bool:
    """Whether a picture carries a manifest, valid or not."""
    from components.files.content_credentials import read_credentials

    return read_credentials(path) is not None


class Signer:
    """The key of a clone and its certificates, ready for many pictures."""

    key: SigningKey

    def __init__(self, root: Path) -> None:
        """Read or make the key.

        Raises:
            KeyUnusable: see `signing_key` and `certificate_chain`.
        """
        from components.files.content_credentials import certificate_chain
        from components.files.signatures import signing_key

        self.key = signing_key(key_folder(root))
        self._chain = certificate_chain(self.key, key_folder(root))

    def sign(self, source: Path, target: Path, fields: dict[str, str]) -> None:
        """Write a signed picture.

        Args:
            source: the picture.
            target: where it goes; it may be `source`.
            fields: what made it, as `made_with` says.

        Raises:
            NotSignable: no picture that holds a manifest.
        """
        from components.files.content_credentials import sign_picture

        software = fields.get("software", "ultraflux-mlops")
        sign_picture(source, target, _lineage(fields), software, self.key, self._chain)


def _lineage(fields: dict[str, str]) -> dict[str, Any]:
    """The embedded fields, digests of weights apart."""
    prefix = "sha256_"
    return {
        "weights_sha256": {
            name.removeprefix(prefix): value
            for name, value in fields.items()
            if name.startswith(prefix)
        },
        "made_with": {n: v for n, v in fields.items() if not n.startswith(prefix)},
    }
