"""SELMA's files: lines that hold Unicode's own line ends, and manifests of a stranger."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mole_kernels.errors import MoleError
from mole_kernels.methods.selma.generators import FileText
from mole_kernels.methods.selma.project import FORMAT, Project, read_lines, write_lines
from mole_kernels.methods.selma.prompts import PromptSettings, kept_requests, write_prompts
from mole_kernels.methods.selma.skills import Skill
from mole_kernels.training.captions import read_captions

# where str.splitlines cuts, besides \n, and what it does not cut at
ENDS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r"
TEXT = st.text(alphabet=st.sampled_from(f'ab{ENDS}\n\\"é'), max_size=12)
SHARED = [HealthCheck.function_scoped_fixture]


@settings(max_examples=60, deadline=None, suppress_health_check=SHARED)
@given(rows=st.lists(st.dictionaries(TEXT, TEXT, max_size=3), max_size=4))
def test_lines_come_back_as_they_were_written(tmp_path, rows):
    write_lines(tmp_path / "rows.jsonl", rows)
    assert read_lines(tmp_path / "rows.jsonl") == rows


@settings(max_examples=40, deadline=None, suppress_health_check=SHARED)
@given(captions=st.lists(TEXT.map(lambda text: f"x{text}x"), min_size=1, max_size=4), bom=st.booleans())
def test_captions_come_back_as_they_were_written(tmp_path, captions, bom):
    rows = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(captions)]
    for row in rows:
        (tmp_path / row["file_name"]).touch()
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "metadata.jsonl").write_bytes(("\ufeff" * bom + text).encode())
    assert read_captions(tmp_path) == ({row["file_name"]: row["text"] for row in rows}, {})


@pytest.mark.parametrize("end", ENDS)
def test_a_run_whose_seeds_hold_unicodes_line_ends_goes_on(tmp_path, end):
    skill = Skill("colours", (f"a red{end}ball", "a blue cup", "a green hat"))
    asked = []

    class Writer:
        name = "writer"

        def write(self, request, number, seed):
            asked.append(number)
            if len(asked) == 2:
                raise KeyboardInterrupt
            # like a seed, so that the rejected prompt is kept beside the seed that it is like
            return f"4. a red ball\n5. word{number} only{number}"

    settings_ = PromptSettings(count=3, more=2)
    with pytest.raises(KeyboardInterrupt):
        write_prompts(Project(tmp_path), skill, Writer(), settings_)
    assert len(kept_requests(Project(tmp_path), "colours")) == 1
    assert len(write_prompts(Project(tmp_path), skill, Writer(), settings_)) == 3
    assert Project(tmp_path).skills() == {"colours": skill}


def test_a_prompt_file_is_cut_at_line_feeds_alone(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffa cat\u2028and a dog\r\na\x85hat\rtwo owls".encode())
    assert FileText(tmp_path / "prompts.txt").lines == ["a cat and a dog", "a hat", "two owls"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
RIGHT = {
    "manifest.json": {
        "format": FORMAT,
        "skills": {"colours": {"seeds": ["a", "b", "c"], "about": ""}},
    },
    "colours/manifest.json": {"format": FORMAT, "train": {"settings": {"rank": 3}, "done": {"steps": 4}}},
    "colours/requests.jsonl": {"by": "w", "accepted": ["a"], "rejected": [], "spare": []},
    "colours/prompts.jsonl": {"prompt": "a"},
}


def places(value, path=()):
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    return {**value, path[0]: replaced(value[path[0]], path[1:], new)}


def use(root):
    project = Project(root)
    for read in (
        project.skills,
        lambda: project.choose(["colours"]),
        lambda: project.prompts("colours"),
        lambda: project.noted("train", "colours"),
        lambda: project.settle("train", "colours", {"rank": 3}),
        lambda: kept_requests(project, "colours"),
    ):
        try:
            read()
        except MoleError as error:
            assert str(root) in str(error)


@settings(max_examples=150, deadline=None, suppress_health_check=SHARED)
@given(data=st.data())
def test_a_strangers_file_gets_words(tmp_path, data):
    (tmp_path / "colours").mkdir(exist_ok=True)
    for name, content in RIGHT.items():
        (tmp_path / name).write_text(json.dumps(content) + "\n")
    name = data.draw(st.sampled_from(sorted(RIGHT)))
    path = data.draw(st.sampled_from(list(places(RIGHT[name]))))
    text = json.dumps(replaced(RIGHT[name], path, data.draw(JSON)))
    cut = data.draw(st.none() | st.integers(0, len(text)))
    (tmp_path / name).write_text(text[:cut])
    use(tmp_path)
