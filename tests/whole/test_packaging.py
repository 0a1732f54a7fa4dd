"""What is shipped, what importing costs, and the house rules that no linter knows."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import is_dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import ecospa_fx

ROOT = Path(__file__).resolve().parents[2]
LONGEST_FUNCTION, LONGEST_FILE = 40, 400
"""In lines of code."""


def library() -> Iterator[Path]:
    """Every Python file that is shipped."""
    for folder in ("ecospa_fx", "passes"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """The name under which a shipped file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("ecospa_fx", *parts) if parts[0] == "passes" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def test_the_listed_packages_are_those_on_disk() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    on_disk = {module_name(path) for path in library() if path.name == "__init__.py"}
    folders = {module_name(path.parent / "__init__.py") for path in library()}
    assert sorted(listed) == sorted(on_disk)
    assert folders == on_disk, "a folder without __init__.py"


@pytest.mark.slow
@pytest.mark.skipif(not all(find_spec(name) for name in ("build", "twine", "setuptools")), reason="needs the extra dev")
def test_the_distribution_is_whole(tmp_path: Path) -> None:
    """The wheel that the source distribution makes holds every module and text, and runs as a command."""
    built = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(built, check=True, capture_output=True)
    (wheel,), (_source,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    checked = [sys.executable, "-m", "twine", "check", "--strict", *map(str, tmp_path.iterdir())]
    subprocess.run(checked, check=True, capture_output=True)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    assert {f"{module_name(path).replace('.', '/')}" for path in library()} <= {
        name.removesuffix(".py").removesuffix("/__init__") for name in names
    }
    assert {"ecospa_fx/py.typed", "ecospa_fx/__init__.pyi", "ecospa_fx/passes/__init__.pyi"} < names
    done = subprocess.run(
        [sys.executable, "-m", "ecospa_fx", "--version"],
        capture_output=True, text=True, check=True, cwd=tmp_path / "installed",
    )  # fmt: skip
    assert done.stdout == f"ecospa-fx {ecospa_fx.__version__}\n"


def test_the_version_is_the_one_in_the_changelog() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {ecospa_fx.__version__}\n" in citation
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {ecospa_fx.__version__}" in changelog
    assert "### Breaking" in changelog


def test_importing_is_light() -> None:
    """Nothing is imported, torch and the library's own modules included, until a name is asked for."""
    code = (
        "import sys, ecospa_fx; print(sorted(m for m in sys.modules if m.partition('.')[0] in ('ecospa_fx', 'torch')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "['ecospa_fx', 'ecospa_fx.version']"


def test_the_verbs_import_nothing_optional() -> None:
    """The GPU stays asleep, too."""
    code = (
        "import sys, ecospa_fx, torch; ecospa_fx.plan, ecospa_fx.score\n"
        "heavy = ('transformers', 'tokenizers', 'safetensors', 'matplotlib')\n"
        "print([name for name in heavy if name in sys.modules], torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split("\n")[0] == "[] False"


def test_passes_cannot_be_imported_by_another_name() -> None:
    done = subprocess.run([sys.executable, "-c", "import passes"], capture_output=True, text=True, cwd=ROOT)
    assert "ImportError" in done.stderr


@pytest.mark.slow
def test_a_checkout_on_the_path_holds_the_passes(tmp_path: Path) -> None:
    """A checkout finds its passes without an installation, as after a plain install of another copy."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import ecospa_fx.passes as p, ecospa_fx; print(p.__file__)"
    no_editable = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in repr(f)]; "
    isolated = [sys.executable, "-c", no_editable + code]
    done = subprocess.run(isolated, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert Path(done.stdout.strip()).resolve() == ROOT / "passes" / "__init__.py"


def imports(tree: ast.AST) -> set[str]:
    """Modules that a tree imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_what_editors_are_told_is_what_is_there() -> None:
    stub = ast.parse((ROOT / "ecospa_fx" / "__init__.pyi").read_text())
    told = {(alias.name, node.module) for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    there = {(name, f"ecospa_fx.{module}") for name, module in vars(ecospa_fx)["_MODULES"].items()}
    packages = {(name, "ecospa_fx") for name in ("calibration", "passes")}
    assert told == {*there, *packages, ("__version__", "ecospa_fx.version")}
    for name, module in there:
        assert getattr(ecospa_fx, name) is getattr(import_module(module), name)
    assert {name for name, _ in there} < set(dir(ecospa_fx))


def test_a_verb_and_a_module_of_one_name(tmp_path: Path) -> None:
    """`plan` is the verb, whichever is asked for first; modules of the package are found as its attributes."""
    asked = "import ecospa_fx as e; from ecospa_fx.plan import Plan; print(callable(e.plan), e.verify.__name__)"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == ["True", "ecospa_fx.verify"]
    with pytest.raises(AttributeError, match="module 'ecospa_fx' has no attribute 'nothing'"):
        _ = ecospa_fx.nothing  # type: ignore[attr-defined]


def test_public_dataclasses_are_frozen() -> None:
    offenders, seen = [], 0
    for path in library():
        if path.name == "__main__.py":
            continue
        if path.name == "lightning.py" and find_spec("lightning") is None:
            continue  # needed by whoever uses it only
        module = import_module(module_name(path))
        for name, value in vars(module).items():
            if not isinstance(value, type) or value.__module__ != module.__name__ or name.startswith("_"):
                continue
            if is_dataclass(value):
                seen += 1
                if not vars(value)["__dataclass_params__"].frozen:
                    offenders.append(f"{module.__name__}.{name}")
    assert seen > 10
    assert not offenders, f"dataclasses that can be changed: {', '.join(offenders)}"


def code_lines(node: ast.AST, text: str) -> int:
    """Lines of code of a module or a function: blank ones and those of docstrings, also of fields, do not count."""
    first, last = getattr(node, "lineno", 1), getattr(node, "end_lineno", len(text.splitlines()))
    lines = {i for i, line in enumerate(text.splitlines(), 1) if line.strip() and first <= i <= last}
    for inner in ast.walk(node):
        if isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Constant) and isinstance(inner.value.value, str):
            lines -= set(range(inner.lineno, (inner.end_lineno or inner.lineno) + 1))
    return len(lines)


def too_long(path: Path) -> Iterator[str]:
    """The functions of a file that are too long, and the file itself."""
    text, tree = path.read_text(encoding="utf-8"), parsed(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = code_lines(node, text)
            if lines > LONGEST_FUNCTION:
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {lines} lines of code"
    lines = code_lines(tree, text)
    if lines > LONGEST_FILE:
        yield f"{path.relative_to(ROOT)} has {lines} lines of code"


def test_functions_and_files_are_short() -> None:
    """What explains the code may be as long as it has to be."""
    offenders = [offender for path in library() for offender in too_long(path)]
    assert not offenders, "\n".join(offenders)


def test_the_size_check_finds_what_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "a.py").write_text("def f():\n" + "    x = 1\n" * LONGEST_FUNCTION)
    assert list(too_long(tmp_path / "a.py")) == ["a.py:1 f has 41 lines of code"]
    (tmp_path / "b.py").write_text('def f():\n    """' + "Much.\n\n" * LONGEST_FILE + '    """\n    return 1\n')
    assert not list(too_long(tmp_path / "b.py"))
    (tmp_path / "c.py").write_text("x = 1\n\n" * (LONGEST_FILE + 1))
    assert list(too_long(tmp_path / "c.py")) == ["c.py has 401 lines of code"]


def asserts(tree: ast.AST) -> bool:
    """Whether anything is asserted: a statement, ``pytest.raises``, or a call of a helper ``check…`` or ``assert…``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("raises", "warns") or name.startswith(("check_", "assert_")):
                return True
    return False


def test_every_test_file_asserts_something() -> None:
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    assert not [path.name for path in files if not asserts(parsed(path))]
    helpers = [parsed(path) for path in (ROOT / "tests" / "support").rglob("*.py")]
    assert not helpers or any(asserts(tree) for tree in helpers)
    assert not asserts(ast.parse("def test_nothing():\n    print(1)"))


LU = {"inv", "inv_ex", "solve", "solve_ex", "tensorinv", "tensorsolve", "lstsq", "pinv", "pinverse", "inverse", "det",
      "logdet", "slogdet", "lu", "lu_factor", "lu_factor_ex", "lu_solve", "lu_unpack", "matrix_exp", "matrix_power",
      "cond"}  # fmt: skip
"""Names in torch, or of methods of tensors, that call for an LU decomposition, or for one of what is not regular."""


def lu_calls(tree: ast.AST) -> Iterator[str]:
    """What a tree takes of torch that decomposes into LU: by attribute of ``torch`` or a tensor, or by import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            yield from (f"{node.lineno} {alias.name}" for alias in node.names if alias.name in LU)
        if isinstance(node, ast.Attribute) and node.attr in LU and _is_of_torch(node):
            yield f"{node.lineno} {node.attr}"


def _is_of_torch(node: ast.Attribute) -> bool:
    """Whether an attribute is torch's: all but those of `self`, and of modules of our own."""
    path = ast.unparse(node.value).split(".")
    return path[0] == "torch" or path[-1] == "linalg" or (path[0] != "self" and node.attr in {"inverse", "det", "lu"})


def test_nothing_asks_for_an_lu_decomposition() -> None:
    """That of a batch of matrices of 160 rows never ends in some builds of torch once threads were set."""
    offenders = [f"{path.relative_to(ROOT)}:{told}" for path in library() for told in lu_calls(parsed(path))]
    assert not offenders, f"Cholesky, QR, eigenvalues or triangular solves instead: {', '.join(offenders)}"


@pytest.mark.parametrize(
    "code",
    ["torch.linalg.inv(a)", "a.inverse()", "from torch.linalg import solve", "linalg.lu_factor(a)", "x.y.det()"],
)
def test_the_check_finds_lu_decompositions(code: str) -> None:
    assert list(lu_calls(ast.parse(code)))
    assert not list(lu_calls(ast.parse("self.inverse[0]; knapsack.solve(a); torch.linalg.qr(a)")))


def test_only_the_command_line_prints() -> None:
    offenders = []
    for path in library():
        calls = (n.func for n in ast.walk(parsed(path)) if isinstance(n, ast.Call))
        prints = any(isinstance(f, ast.Name) and f.id == "print" for f in calls)
        if prints and path != ROOT / "ecospa_fx" / "cli" / "main.py":
            offenders.append(path.name)
    assert not offenders
