"""How long `mixmerge plan` takes for a sweep of merges, from nothing and over a store in which everything is done.

    OMP_NUM_THREADS=1 python benchmarks/plan.py [--candidates 500 --prompts 200 --repeat 5]

Writes a recipe with that many merges, once as three sweeps and once written out, with two languages, three prompt sets and a
tiny base, and runs the command in a process of its own: as it is, with `--json`, and with a record of every step in the store.
Prints seconds of the processor (other work on the machine counts less in them than in wall time), user and system, the best
of `--repeat`, and whether torch was imported. Nothing is asserted; the aim is two seconds for 500 candidates.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

METHODS = {"linear": "", "ties": ", parameters: {density: 0.5}", "dare_ties": ", parameters: {density: 0.5}"}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
COMMAND = "import sys; sys.argv[0] = 'mixmerge'; from mixmerge.cli import main\ntry:\n  main()\nfinally:\n"
COMMAND += "  print('torch' in sys.modules, file=sys.stderr)"


def write_base(folder: Path) -> None:
    """A model folder of two small layers over bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<|im_start|>", "<|im_end|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"chat_template": CHATML, "eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": len(vocabulary)}
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    shapes = {"model.embed_tokens.weight": (len(vocabulary), 32), "model.norm.weight": (32,)}
    for layer in range(2):
        place = f"model.layers.{layer}"
        shapes |= {f"{place}.self_attn.{name}_proj.weight": (32, 32) for name in "qkvo"}
        shapes |= {f"{place}.mlp.{name}_proj.weight": (64, 32) for name in ("gate", "up")}
        shapes |= {f"{place}.mlp.down_proj.weight": (32, 64), f"{place}.input_layernorm.weight": (32,)}
        shapes[f"{place}.post_attention_layernorm.weight"] = (32,)
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, folder / "model.safetensors")


def write_recipe(path: Path, candidates: int, prompts: int, *, swept: bool) -> None:
    """The recipe, its merges as sweeps of a weight or one by one."""
    lines = ["name: sweep", "base: ./base", "languages: [en, fr]", "data:"]
    for name in ("general", "safety"):
        lines.append(f'  {name}: {{objective: {name}, path: "starter:train/{name}.{{lang}}.jsonl"}}')
    lines += ["budget: {rows: 64}", "training: {learning_rate: 1.0e-4, max_length: 512}", "experts:"]
    lines += ["  general: {mixture: general}", "  safety: {mixture: safety}", "merges:"]
    for index, (method, rest) in enumerate(METHODS.items()):
        count = candidates // len(METHODS) + (index < candidates % len(METHODS))
        weights = [round(0.1 + 0.8 * at / count, 4) for at in range(count)]
        each = f"{{method: {method}, models: {{general: {{weight: %s}}, safety: {{weight: %s}}}}{rest}}}"
        if swept:
            lines.append(f"  {method}-{{weight}}: " + each % ("rest", f"{{sweep: {weights}}}"))
        else:
            lines += [f"  {method}-{weight}: " + each % (round(1 - weight, 4), weight) for weight in weights]
    lines += ["evaluation:", "  prompts:"]
    for name, purpose in (("general", "general"), ("harmful", "harmful"), ("harmless", "harmless")):
        lines.append(f'    {name}: {{purpose: {purpose}, path: "starter:prompts/{name}.{{lang}}.jsonl"}}')
    lines += [f"  limit: {{dev: {prompts // 4}, test: {prompts}}}", "  max_new_tokens: 40"]
    path.write_text("\n".join(lines) + "\n")


def finish_all(recipe: Path, out: Path) -> None:
    """A record of every step, as a run would leave it, without the work."""
    import mixmerge
    from mixmerge.machine import this_machine
    from mixmerge.plan.graph import REVISIONS

    plan, here = mixmerge.plan(recipe), this_machine()
    told = {
        "host": platform.node(),
        "processor": here.processor,
        "cores": here.cores,
        "gpus": list(here.gpus),
        "seconds": 1.0,
    }
    for step in plan.steps:
        folder = out / "store" / step.kind / f"{step.name}--{step.id}"
        folder.mkdir(parents=True)
        inputs = {role: {"id": i, "name": plan.by_id[i].name} for role, i in step.inputs.items()}
        record = step.to_json() | {"revision": REVISIONS[step.kind], "inputs": inputs, "files": {"rows": 4}}
        record |= {"measurements": {"parameters": 1000, "tokens": 1000, "rows": 10}, "provenance": told}
        (folder / "rows").write_text("rows")
        (folder / "record.json").write_text(json.dumps(record))


def seconds(recipe: Path, out: Path, *arguments: str, repeat: int) -> tuple[float, str]:
    """Processor seconds of the quickest run, and what the last one said."""
    command = [sys.executable, "-c", COMMAND, "plan", str(recipe), "--out", str(out), *arguments]
    found = []
    for _ in range(repeat):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        ran = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    torch = "torch imported" if ran.stderr.splitlines()[-1] == "True" else "no torch"
    last = torch if "--json" in arguments or "--graph" in arguments else f"{torch}; {ran.stdout.splitlines()[-1]}"
    return min(found), last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--candidates", type=int, default=500)
    parser.add_argument("--prompts", type=int, default=20, help="test prompts of a set and language")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    print(f"{options.candidates} merges, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_base(folder / "base")
        for swept in (True, False):
            recipe, form = folder / f"recipe-{swept}.yaml", "sweeps" if swept else "written out"
            write_recipe(recipe, options.candidates, options.prompts, swept=swept)
            for arguments in ((), ("--json",), ("--graph",)):
                took, said = seconds(recipe, folder / "out", *arguments, repeat=options.repeat)
                print(f"{form + ' ' + ' '.join(arguments):<24} {took:5.2f} s  {said}")
        finish_all(recipe, folder / "done")
        took, said = seconds(recipe, folder / "done", repeat=options.repeat)
        print(f"{'all done':<24} {took:5.2f} s  {said}")
        took, said = seconds(recipe, folder / "done", "--set", "training.learning_rate=1.0e-5", repeat=options.repeat)
        print(f"{'all done, one change':<24} {took:5.2f} s  {said}")


if __name__ == "__main__":
    main()
