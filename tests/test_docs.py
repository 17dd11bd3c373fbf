"""The documents say what the program does."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from typer.main import get_command

from mixmerge.cli import RECIPES, app
from mixmerge.merge import load_config
from mixmerge.merge.diagnose import SMALL
from mixmerge.merge.geometry import PARALLEL
from mixmerge.merge.tensors import BLOCK, BUFFER, MASKS
from mixmerge.recipe.load import load_recipe
from mixmerge.recipe.reference import recipe_reference

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(get_command(app).commands)


def test_the_recipe_reference_is_that_of_the_schema():
    assert (ROOT / "docs/recipe.md").read_text(encoding="utf-8") == recipe_reference(), "see AGENTS.md to make it again"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_stands_in_the_readme(command):
    assert f"mixmerge {command} " in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["README.md", "AGENTS.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_links_between_pages_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md", "docs/identity.md", "docs/merging.md", "AGENTS.md"])
def test_only_commands_that_exist_are_told(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    told = set(re.findall(r"(?:^|`|bin/)mixmerge ([a-z]+(?:-[a-z]+)?)(?= |`|$)", text, flags=re.MULTILINE))
    assert told <= set(COMMANDS)


def test_the_example_on_merging_is_a_configuration_and_the_numbers_beside_it_are_those_of_the_code(tmp_path):
    text = (ROOT / "docs/merging.md").read_text(encoding="utf-8")
    example, *_ = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "merge.yml").write_text(example, encoding="utf-8")
    config = load_config(tmp_path / "merge.yml")
    assert (config.merge_method, config.seed, config.stored_dtype) == ("ties", 7, "BF16")
    densities = [values["density"] for values in config.whole.at("layers.1.mlp.up_proj.weight", (4, 4), 0.25).per_input]
    assert densities == [pytest.approx(0.4), 0.8]
    assert f"{BLOCK:,} elements" in text
    assert f"at most {BUFFER / (1 << 20):.0f} MB" in text
    assert f"most\n{MASKS / (1 << 20):.0f} MB of masks" in text
    assert f"at most {SMALL:,} elements" in text
    assert f"Above {PARALLEL}" in text


@pytest.mark.parametrize("name", RECIPES)
def test_every_shipped_recipe_holds_together_and_explains_each_key(name):
    path = ROOT / "recipes" / f"{name}.yaml"
    load_recipe(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    top = [line for line in lines if re.match(r"[a-z]+:", line) and not line.endswith(":")]
    assert all("#" in line for line in top if not line.startswith("name") or "#" in line)


def test_the_wheel_carries_starter_data_templates_and_recipes(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, suffix in (("starter", ".jsonl"), ("report/templates", "")):
        here = {
            p.relative_to(ROOT / "src").as_posix()
            for p in (ROOT / "src/mixmerge" / folder).rglob(f"*{suffix}")
            if p.is_file() and "__pycache__" not in p.parts
        }
        assert here
        assert here <= names
    assert {f"mixmerge/recipes/{name}.yaml" for name in RECIPES} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.endswith((".safetensors", ".gguf")) for name in names)
