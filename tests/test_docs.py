"""What README and docs say: links lead somewhere, commands and flags exist, and Python code runs."""

import ast
import dataclasses
import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import jax
import pytest
from cli import finished, import_copy
from common import brisk_jit, build, load, quick_jit, tiny_args
from test_ppo import unread_fields

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
# Flags of pip, srun, XLA, ...
OTHERS = {"--no-deps", "--ntasks", "--gpus-per-task", "--durations", "--dist", "--check", "--user", "--xla"}
# Flags of earlier commits, which docs/tmaze_earlier.md explains.
EARLIER = {"--gate-init", "--critic-bias", "--cautious-entropy"}
OURS = re.compile(r"^(benchmarks/|tests/|ppo_)\S*\.(py|sh)$")


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of a page in this language."""
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.S)


def commands(path: Path) -> list[list[str]]:
    """Every command of a page that starts one of our scripts, in a block or in backquotes, as a list of words."""
    text = path.read_text().replace("\\\n", " ")
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines()]
    lines += re.findall(r"`([^`]*)`", re.sub(r"```.*?```", "", text, flags=re.S))
    found = [shlex.split(line.replace("\n", " "), comments=True) for line in lines if "python" in line or ".sh" in line]
    return [words for words in found if any(map(OURS.search, words))]


def links(path: Path) -> list[tuple[str, str]]:
    """Text and target of each link of a page into the repository."""
    found = re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", path.read_text())
    return [(text, target) for text, target in found if not target.startswith("http")]


def anchors(path: Path) -> set[str]:
    """The headings of a page as GitHub's link targets."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", path.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_requirements_name_what_is_imported():
    """Each library that scripts, environments, tests or benchmarks import is there, in a range of versions."""
    requirements = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, versions = re.match(r"([\w-]+)([^;#]*)", line).groups()
            requirements[name.replace("-", "_").lower()] = versions
            assert "==" in versions or {">=", "<"} <= {*re.findall(r"[<>=]+", versions)}, line
    paths = [path for pattern in ("*.py", "envs/*.py", "benchmarks/*.py", "tests/*.py") for path in ROOT.glob(pattern)]
    own = {path.stem for path in paths} | {"envs", "benchmarks", "tests"}
    other = {"pygame", "memory_gym", "gym"}  # of Memory Gym's separate environment; what memory-maze alone needs
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    found = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    found |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found = {name.split(".")[0] for name in found} - {*sys.stdlib_module_names} - own - other
    renamed = {"PIL": "pillow", "orbax": "orbax_checkpoint"}
    assert len(found) > 10 and {renamed.get(name, name) for name in found} - {*requirements} == set()


def test_the_pages_are_read():
    """The functions above find links, commands and headings, which the tests below need."""
    assert sum(len(links(path)) for path in PAGES) > 150
    assert sum(len(commands(path)) for path in PAGES) > 70
    assert {"quick-start", "results"} <= anchors(PAGES[0])


def own_flags(name: str) -> set[str]:
    """The flags of one of our scripts, with underscores."""
    return {field.name for field in dataclasses.fields(load(name).Args)}


@page
def test_links_lead_somewhere(page):
    for text, target in links(page):
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists() and (not anchor or anchor in anchors(path)), target
        if path.suffix == ".py":  # then the text may name classes and functions
            for name in re.findall(r"`([A-Za-z_]+)`", text):
                assert re.search(rf"^ *(class|def) {name}\b|^{name} = ", path.read_text(), re.M), (name, target)


def test_every_image_is_shown():
    """Every image in docs/ is on a page."""
    text = "".join(page.read_text() for page in PAGES)
    for image in [*ROOT.glob("docs/**/*.png"), *ROOT.glob("docs/**/*.gif")]:
        assert image.name in text, image


@page
def test_commands_can_be_run(page):
    """The files that commands start exist, and scripts accept their flags."""
    for words in commands(page):
        start = next(i for i, word in enumerate(words) if OURS.search(word))
        path, flags = words[start], [word for word in words[start + 1 :] if word != "--help"]
        mine = path.startswith("ppo_mine")
        assert mine or (ROOT / path).exists(), words
        if path.startswith("ppo_"):
            script = load("ppo_lstm_tmaze" if mine else Path(path).stem)
            place = next((i for i, flag in enumerate(flags) if flag in ("--resume", "--evaluate")), None)
            if place is not None:  # such a folder does not exist here
                del flags[place : place + 2]
            if "..." not in flags:
                script.parse_args([flag if flag != "N" else "1" for flag in flags])


PRESETS = [path for path in ROOT.glob("benchmarks/*.sh") if path.name != "gpu.sh"]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.name)
def test_presets_can_be_run(preset):
    """The scripts that benchmarks/*.sh start accept the flags that they get."""
    commands = re.sub(r"^( *)python ", r"\1echo ", preset.read_text(), flags=re.M)  # prints what it would run
    done = subprocess.run(["bash", "-c", commands, preset, "3"], capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        path, *flags = line.removeprefix("benchmarks/without_memory.py ").split()
        name = Path(path).stem.replace("unaware", "agalite").replace("linear", "galite")  # copies
        assert load(name).parse_args(flags).seed == 3
    assert done.stdout


def test_gpu_sh_finds_its_files_and_tests():
    """The programs that it starts exist. Each word of its -k selects a test, and each of its files has one."""
    text = (ROOT / "benchmarks" / "gpu.sh").read_text()
    programs = set(re.findall(r"python (\S+\.py)", text))
    assert len(programs) == 4 and all((ROOT / path).exists() for path in programs)
    words, folder = re.search(r'-k "(.*)" \\\n\s+tests/test_{(.*)}\.py', text).groups()
    sources = {name: (ROOT / "tests" / f"test_{name}.py").read_text() for name in folder.split(",")}
    for word in words.split(" or "):
        assert any(re.search(rf"def test_\w*{word}", source) for source in sources.values()), word
    for name, source in sources.items():
        assert any(re.search(rf"def test_\w*{word}", source) for word in words.split(" or ")), name


@page
def test_flags_exist(page):
    """Every flag that a page names belongs to a script, a benchmark or a test."""
    fields = set().union(*(own_flags(path.stem) for path in ROOT.glob("ppo_*.py")))
    sources = "".join(path.read_text() for path in [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("tests/*.py")])
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", page.read_text())) - OTHERS - EARLIER:
        name = flag[2:].replace("-", "_")
        known = name in fields or name.removeprefix("no_") in fields
        assert known or f'"{flag}"' in sources or f"    {name}: " in sources or flag == "--help", flag


@pytest.mark.slow
def test_the_notebook_example_of_readme_runs(monkeypatch):
    monkeypatch.setattr(jax, "jit", quick_jit)
    (code,) = blocks(ROOT / "README.md", "python")
    small = "script.Args(num_layers=1, d_model=8, d_head=4, d_ffc=8, num_envs=8, num_steps=16, corridor_len=20)"
    names = {}
    exec(code.replace("script.Args(corridor_len=20)", small), names)
    assert int(names["runner"].train_state.step) == 8


@pytest.mark.slow
def test_the_trained_policy_of_usage_acts(monkeypatch):
    """docs/usage.md loads a run in Python. The test replaces its folder by that of a run of the tests."""
    monkeypatch.setattr(jax, "jit", quick_jit)
    (code,) = blocks(ROOT / "docs/usage.md", "python")
    code = re.sub(r'Path\("runs/[^"]*"\)', f"Path({str(finished('ppo_agalite_tmaze'))!r})", code)
    names = {}
    exec(code, names)
    assert names["action"].shape == (1,) and names["obs"].shape[0] == 1


OWN = blocks(ROOT / "docs/your_own.md", "python")


def block_with(text: str) -> str:
    (found,) = [block for block in OWN if text in block]
    return found.rstrip() + "\n"


def replace_between(source: str, start: str, end: str, new: str) -> str:
    before, rest = source.split(start, 1)
    return before + new + end + rest.split(end, 1)[1]


@pytest.mark.slow
def test_a_memory_of_your_own_passes_the_tests(tmp_path):
    """The tests find the copy that docs/your_own.md describes, and it passes them."""
    source = (ROOT / "ppo_lstm_tmaze.py").read_text()
    source = replace_between(source, "def over_time(", "class ActorCritic(", block_with("class MinGRU") + "\n\n")
    memory = block_with("def initial_memory").replace("    @nn.nowrap\n", "", 1)
    source = replace_between(source, "    def initial_memory", "    @nn.compact\n", memory + "\n")
    source = replace_between(
        source, "        x, memory = LSTM", "        actor, critic", block_with("MinGRU(self.args")
    )
    (field,) = re.findall(r"`(num_layers: int = .*?)`", (ROOT / "docs/your_own.md").read_text())
    source = source.replace("    hidden_size: int", f"    {field}\n    hidden_size: int", 1)
    source = source.replace('sizes = "', 'sizes = "num_layers ', 1)
    for folder in ("tests", "envs", "benchmarks"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(path, tmp_path)
    (tmp_path / "ppo_mine_tmaze.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k"]
    command += ["(mine or scripts_agree) and not four_devices"]
    files = ["tests/test_memory.py", "tests/test_ppo.py", "tests/test_sync.py"]
    files += ["tests/test_cli.py::test_every_script_refuses_impossible_arguments"]
    done = subprocess.run([*command, *files], cwd=tmp_path, capture_output=True, text=True)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and int(passed[1]) >= 20, done.stdout[-3000:]


@pytest.mark.parametrize("memory", ["mine", "lstm", "gru"])
@pytest.mark.parametrize("name, following", [("mysterypath", "def patches("), ("craftax", "class SymbolEncoder(")])
def test_a_memory_of_your_own_fits_other_tasks(name, following, memory, tmp_path):
    """What docs/your_own.md says about copies for Mystery Path and Craftax gives a script that runs."""
    if memory == "mine":
        model, initial_memory = block_with("class MinGRU") + "\n\n", block_with("def initial_memory") + "\n"
        initial_memory = initial_memory.replace("    @nn.nowrap\n", "", 1)
        call, unread = block_with("MinGRU(self.args").replace("(obs)", "(x)", 1), []
    else:
        between = lambda start, end: start + source_of_memory.split(start, 1)[1].split(end, 1)[0]
        source_of_memory = (ROOT / f"ppo_{memory}_tmaze.py").read_text()
        model = between("def over_time(", "class ActorCritic(")
        initial_memory = between("    def initial_memory", "    @nn.compact\n")
        call, unread = f"        x, memory = {memory.upper()}(self.args.d_model)(x, reset, memory)\n", ["num_layers"]
    source = (ROOT / f"ppo_agalite_{name}.py").read_text()
    source = replace_between(source, "class GRUGate(", following, model)
    source = replace_between(source, "    def initial_memory", "    @nn.compact\n", initial_memory)
    start, end = re.search(r"        x, memory = AGaLiTe\(.*\n", source).span()
    source = source[:start] + call + source[end:]
    source = source.replace("memory: Memory)", "memory)").replace("args.hidden_size", "args.d_model")
    for field in ("d_head", "d_ffc", "num_heads", "eta", "r", "chrono_steps", *unread):
        source, count = re.subn(rf"^    {field}: .*\n", "", source, flags=re.M)
        source = re.sub(rf"^(        sizes \+?= .*) {field}\b", r"\1", source, flags=re.M)
        assert count == 1
    copy = tmp_path / f"ppo_mine_{name}.py"
    copy.write_text(source)
    script = import_copy(copy)
    args = tiny_args(script)
    env, agent = build(script, args)
    begin_and_update = lambda key: script.update(args, env, script.init(args, env, agent, key))
    runner, metrics, _ = jax.eval_shape(begin_and_update, jax.random.key(0))
    assert {x.shape for x in runner.memory} == {(args.num_envs, args.d_model)} and "losses/entropy" in metrics
    assert unread_fields(source) == set()


def test_an_environment_of_your_own_trains(tmp_path, monkeypatch):
    """The copy for the environment of docs/your_own.md makes an update, and plays an episode that succeeds."""
    recall = types.ModuleType("envs.recall")
    exec(block_with("class Recall:"), vars(recall))
    monkeypatch.setitem(sys.modules, "envs.recall", recall)
    source = (ROOT / "ppo_lstm_tmaze.py").read_text()
    source = replace_between(source, "def make_env(", "\n\n# ---", block_with("Recall(args.delay)") + "\n")
    changes = {
        "from envs.tmaze import TMaze": "from envs.recall import Recall",
        "EpisodeNoise, EpisodeStatistics, TimeAwareObservation, ": "EpisodeStatistics, ",
        "        noise, steps_left, obs = .*\n": "",
        "\\(actor\\) \\+ noise": "(actor)",
        "        # n equal rewards .*\n        value = .*steps_left .*\n": "",
        "    logit_noise: .*\n": "",
        '"logit_noise ': '"',
        "    corridor_len: .*\n": "    delay: int = 10  # steps until the answer\n",
        "    num_distractors: .*\n    max_episode_steps: .*\n": "",
        'sizes = "': 'sizes = "delay ',
        " *no_noise = .*\n": "",
        "make_env\\(no_noise, 1\\)": "make_env(args, 1)",
        "make_env\\(no_noise, args": "make_env(args, args",
    }
    for pattern, new in changes.items():
        source, count = re.subn(pattern, new, source)
        assert count == 1, pattern
    assert unread_fields(source) == set() and "no_noise" not in source and "steps_left" not in source
    copy = tmp_path / "ppo_mine_recall.py"
    copy.write_text(source)
    script = import_copy(copy)
    args = tiny_args(script, delay=3)
    env = script.make_env(args, args.num_envs)
    agent = script.ActorCritic(args, env.action_space(env.default_params).n)
    runner = quick_jit(functools.partial(script.init, args, env, agent))(jax.random.key(0))
    _, metrics, outcomes = quick_jit(functools.partial(script.update, args, env))(runner)
    assert metrics["charts/episodes"] > 0 and 0 <= outcomes["charts/success_rate"] <= 1

    obs, state = env.reset(jax.random.key(0), env.default_params)
    shown = obs.argmax(-1)
    for time in range(4):
        obs, state, reward, done, info = env.step(jax.random.key(time), state, shown, env.default_params)
    assert done.all() and (reward == 1).all() and info["success"].all()


def test_a_gymnax_environment_is_adapted(monkeypatch):
    """The adapter calls gymnax's functions without automatic reset. gymnax itself is not installed here."""
    gymnax, inner, names = mock.Mock(), mock.Mock(), {}
    gymnax.make.return_value = inner, "params"
    monkeypatch.setitem(sys.modules, "gymnax", gymnax)
    exec(block_with("class Gymnax:"), names)
    env = names["Gymnax"]("CartPole-v1")
    gymnax.make.assert_called_once_with("CartPole-v1")
    assert env.default_params == "params" and env.action_space is inner.action_space
    assert env.reset("key", "params") is inner.reset_env.return_value
    assert env.step("key", "state", 0, "params") is inner.step_env.return_value


@pytest.mark.slow
def test_the_tutorial_runs(monkeypatch):
    """docs/tutorial.ipynb runs from its first cell to its last, with one layer and shorter training, and its assertions
    hold. Its stored output shows an agent that has learnt; that AGaLiTe learns is tested in test_learning.py."""
    cells = json.loads((ROOT / "docs/tutorial.ipynb").read_text())["cells"]
    printed = "".join("".join(output.get("text", "")) for cell in cells for output in cell.get("outputs", []))
    assert int(re.search(r"correct turns: (\d+)%", printed)[1]) > 95
    monkeypatch.chdir(ROOT / "docs")
    monkeypatch.setattr(sys, "path", sys.path.copy())
    names = {}
    shorter = ("num_layers=2", "num_layers=1"), ("total_timesteps=400_000", "total_timesteps=33_000")
    shorter += (("corridor_len=20", "corridor_len=20, max_episode_steps=100"),)  # the untrained agent reaches the limit
    for cell in cells:
        if cell["cell_type"] == "code":
            source = functools.reduce(lambda source, change: source.replace(*change), shorter, "".join(cell["source"]))
            monkeypatch.setattr(jax, "jit", brisk_jit if "script.update" in source else quick_jit)
            exec(source, names)
    args = names["args"]
    assert (args.num_layers, args.num_updates, args.max_episode_steps) == (1, 2, 100), "all replacements were made"
    assert names["results"]["success"].shape == (200,)
