"""`localsteer run`: what is answer and what is talk, where the prompt and the settings come from."""

from __future__ import annotations

import json

import pytest
from cli_runs import invoke, program, write_vector

from localsteer import ControlVector, Engine, Sampling
from localsteer.cli.vector_spec import VectorSpec
from localsteer.errors import PlanError, VectorFileError

GREEDY = ("--temp", "0", "-n", "12", "-t", "1")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALSTEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def vector(folder):
    return write_vector(folder / "strong.gguf")


@pytest.fixture(scope="module")
def replies(tiny_llama):
    """What the library answers to these prompts, greedily; `run` must say the same."""

    def reply(prompt, steer=(), **options):
        with Engine(tiny_llama.gguf_path, n_threads=1, n_seq_max=1) as engine:
            return engine.generate(
                prompt, steer=steer, max_tokens=12, sampling=Sampling(temp=0), **options
            ).text

    return reply


def run(tiny_llama, *args, input=""):
    done = invoke("run", "-m", tiny_llama.gguf_path, *GREEDY, *args, input=input)
    assert done.status == 0, done.err
    return done


# --- the reply ---------------------------------------------------------------------------------------------


def test_stdout_is_the_reply_and_nothing_else(tiny_llama, replies):
    done = program("run", "-m", tiny_llama.gguf_path, *GREEDY, "Tell me about foxes.")
    assert done.out == replies("Tell me about foxes.") + "\n"
    assert done.err == "localsteer: the reply was cut after 12 tokens: raise -n for more.\n"


def test_a_vector_file_steers_as_the_library_does(tiny_llama, replies, vector):
    steered = run(tiny_llama, "-s", vector, "Tell me about foxes.").out
    assert steered == replies("Tell me about foxes.", [ControlVector.load(vector)]) + "\n"
    assert steered != run(tiny_llama, "Tell me about foxes.").out


def test_strength_and_layer_behind_the_name_override_the_file(tiny_llama, replies, vector):
    chosen = ControlVector.load(vector).at(strength=0.8, layer=1)
    assert run(tiny_llama, "-s", f"{vector}:0.8@1", "Hi").out == replies("Hi", [chosen]) + "\n"


def test_options_override_the_file_and_the_name_overrides_the_options(tiny_llama, vector):
    options = ("--layer", "0,3", "--mode", "add", "--positions", "last", "--strength", "0.5")
    document = run(tiny_llama, "-s", vector, *options, "--json", "Hi").json
    assert document["steering"] == [
        {"name": "strong", "layers": [0, 3], "mode": "add", "positions": "last", "strength": 0.5}
    ]
    document = run(tiny_llama, "-s", f"{vector}:2@1", *options, "--json", "Hi").json
    assert (document["steering"][0]["strength"], document["steering"][0]["layers"]) == (2, [1])


def test_strength_zero_is_the_plain_reply(tiny_llama, replies, vector):
    assert run(tiny_llama, "-s", f"{vector}:0", "Hi").out == replies("Hi") + "\n"


def test_two_vectors_are_one_plan(tiny_llama, replies, folder, vector):
    other = write_vector(folder / "other.gguf", seed=1)
    both = [ControlVector.load(vector), ControlVector.load(other)]
    assert run(tiny_llama, "-s", vector, "-s", other, "Hi").out == replies("Hi", both) + "\n"


def test_parallel_vectors_need_a_ridge(tiny_llama, vector):
    twice = ("-s", vector, "-s", vector)
    assert "nearly parallel" in invoke("run", "-m", tiny_llama.gguf_path, *twice, "Hi").complaint()
    done = run(tiny_llama, *twice, "--ridge", "0.1", "Hi")
    assert "approached, not reached" in done.err


def test_json_is_one_document_with_everything_to_repeat_the_reply(tiny_llama, replies, vector):
    document = run(tiny_llama, "-s", vector, "--json", "Hi").json
    assert document["model"] == str(tiny_llama.gguf_path)
    assert document["prompt"] == "Hi"
    assert document["reply"] == replies("Hi", [ControlVector.load(vector)])
    assert (document["finish_reason"], document["n_tokens"]) == ("length", 12)
    assert isinstance(document["seed"], int)
    assert document["timings"]["prompt_tokens"] > 0


def test_one_seed_gives_one_reply(tiny_llama):
    args = ("run", "-m", tiny_llama.gguf_path, "-n", "12", "--temp", "1.5")
    assert invoke(*args, "--seed", "7", "Hi").out == invoke(*args, "--seed", "7", "Hi").out
    for another in ((), ("--seed", "-1")):  # -1 asks for one at random, as in llama.cpp
        seeds = {invoke(*args, *another, "--json", "Hi").json["seed"] for _ in range(2)}
        assert len(seeds) == 2 and min(seeds) >= 0


def test_compare_shows_both_replies_side_by_side(tiny_llama, replies, vector):
    done = run(tiny_llama, "-s", vector, "--compare", "--json", "Hi").json
    assert done["plain"]["reply"] == replies("Hi")
    assert done["reply"] == replies("Hi", [ControlVector.load(vector)])
    table = run(tiny_llama, "-s", vector, "--compare", "Hi").out
    head = table.splitlines()[0]
    assert head.startswith("plain ") and "strong:1@2 project all" in head


def test_raw_and_system_go_to_the_model_as_asked(tiny_llama, replies):
    assert run(tiny_llama, "--raw", "Hi").out == replies("Hi", raw=True) + "\n"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert run(tiny_llama, "--system", "Be brief.", "Hi").out == replies(messages) + "\n"


def test_a_grammar_binds_the_reply(tiny_llama, folder):
    (folder / "yes.gbnf").write_text('root ::= "yes"')
    assert run(tiny_llama, "--grammar", 'root ::= "no"', "Hi").out == "no\n"
    assert run(tiny_llama, "--grammar-file", "yes.gbnf", "Hi").out == "yes\n"


def test_a_json_schema_binds_the_reply(tiny_llama, folder):
    (folder / "no.json").write_text('{"const": "no"}')
    assert run(tiny_llama, "--json-schema", '{"const": ["a"]}', "Hi").out.replace(" ", "") == '["a"]\n'
    assert run(tiny_llama, "-j", "no.json", "Hi").out == '"no"\n'


@pytest.mark.parametrize(
    "form",
    [
        ("--json-schema", '{"type": "string", "maxLength": 20}'),
        ("--grammar", "root ::= [a-z]+"),
    ],
)
def test_a_reply_under_a_form_stays_plain_unless_it_is_asked_for(tiny_llama, vector, form):
    steered = ("-s", vector, "--positions", "generation", *form)
    plain, kept = run(tiny_llama, *form, "Hi"), run(tiny_llama, *steered, "Hi")
    loose = run(tiny_llama, *steered, "--steer-forms", "Hi")
    assert kept.out == plain.out != loose.out
    assert "--steer-forms" in kept.err and "--steer-forms" not in loose.err + plain.err
    both = json.loads(run(tiny_llama, *steered, "--compare", "--json", "Hi").out)
    assert both["reply"] == both["plain"]["reply"]


def test_the_prompt_of_a_form_is_steered_all_the_same(tiny_llama, vector):
    form = ("--grammar", "root ::= [a-z]+")
    at_all = run(tiny_llama, "-s", vector, "--positions", "all", *form, "Hi")
    at_prompt = run(tiny_llama, "-s", vector, "--positions", "prompt", *form, "Hi")
    assert at_all.out == at_prompt.out != run(tiny_llama, *form, "Hi").out
    assert "--steer-forms" not in at_prompt.err


def test_a_stop_text_ends_the_reply_before_it(tiny_llama, replies):
    whole = replies("Hi")
    stop = next(whole[i : i + 3] for i in range(3, len(whole)) if whole.index(whole[i : i + 3]) == i)
    assert run(tiny_llama, "-r", stop, "Hi").out == whole[: whole.index(stop)] + "\n"


def test_a_full_context_ends_the_reply_and_says_so(tiny_llama):
    done = invoke("run", "-m", tiny_llama.gguf_path, "--temp", "0", "-c", "24", "-n", "-1", "--raw", "Hi")
    assert done.status == 0
    assert "the context of 24 tokens is full" in done.err


def test_timings_are_talk(tiny_llama):
    done = run(tiny_llama, "--timings", "Hi")
    assert "per second" in done.err and "per second" not in done.out


# --- a prompt that asks already ----------------------------------------------------------------------------

ASKED = "Tell me about foxes. Answer in rhyme."
LEFT_OUT = (
    "localsteer: strong is left out: the prompt already asks for it, and its file says that steering then "
    "does harm (told 75%, told and steered 25%); --always-steer applies it anyway.\n"
)


@pytest.fixture
def harmful(folder):
    record = {"n": 8, "scores": {"instructed": 0.75, "both": 0.25}}
    origin = {"phrasings": ["Answer in rhyme."], "validation": record}
    return write_vector(folder / "strong.gguf", provenance=origin)


def test_a_vector_that_does_harm_is_left_out_where_the_prompt_asks_already(tiny_llama, replies, harmful):
    done = run(tiny_llama, "-s", harmful, ASKED)
    assert done.out == replies(ASKED) + "\n"
    assert done.err.count(LEFT_OUT) == 1
    done = run(tiny_llama, "-s", harmful, "Tell me about foxes.")
    assert done.out == replies("Tell me about foxes.", [ControlVector.load(harmful)]) + "\n"
    assert "left out" not in done.err


@pytest.mark.parametrize("how", ["--always-steer", "--strength", "behind the name", "--compare", "--raw"])
def test_who_insists_gets_the_steered_reply(tiny_llama, replies, harmful, how):
    more = {"--strength": ("--strength", "1"), "behind the name": ()}.get(how, (how,))
    spec = f"{harmful}:1" if how == "behind the name" else harmful
    done = run(tiny_llama, "-s", spec, *more, "--json", ASKED)
    steered = replies(ASKED, [ControlVector.load(harmful)], raw=how == "--raw")
    assert done.json["reply"] == steered != replies(ASKED, raw=how == "--raw")
    assert "left out" not in done.err and "left_out" not in done.json


def test_json_names_what_was_left_out(tiny_llama, harmful, folder):
    other = write_vector(folder / "other.gguf", seed=1)
    document = run(tiny_llama, "-s", harmful, "-s", other, "--json", ASKED).json
    assert document["left_out"] == ["strong"]
    assert [row["name"] for row in document["steering"]] == ["other"]


# --- the prompt --------------------------------------------------------------------------------------------


def test_the_prompt_comes_from_a_pipe(tiny_llama):
    for args in ((), ("-",)):
        document = run(tiny_llama, "--json", *args, input="Hi there\n").json
        assert document["prompt"] == "Hi there"


def test_piped_text_comes_before_the_argument(tiny_llama):
    document = run(tiny_llama, "--json", "Sum this up.", input="Some notes.\n").json
    assert document["prompt"] == "Some notes.\n\nSum this up."


def test_an_empty_pipe_adds_nothing(tiny_llama):
    assert run(tiny_llama, "--json", "Hi", input="").json["prompt"] == "Hi"


# --- a vector made on first use ----------------------------------------------------------------------------


def test_an_instruction_is_extracted_once_and_kept_for_this_model(tiny_llama, folder):
    (folder / "queries.txt").write_text("Tell me about foxes.\nDescribe a river.\nWhat is a village?\n")
    args = ("-i", "Answer in rhyme.", "--queries", "queries.txt", "--pairs", "3", "--json", "Hi")
    first = run(tiny_llama, *args)
    assert "making it now" in first.err
    assert first.json["steering"][0]["name"] == "answer_in_rhyme"
    second = run(tiny_llama, *args)
    assert "making it now" not in second.err
    assert second.json["reply"] == first.json["reply"]
    listed = invoke("vectors", "--json").json["vectors"]
    assert [vector["name"] for vector in listed] == ["answer_in_rhyme"]


# a layer of one's own: no search, whose replies on the tiny model never end, and take seconds
RHYME = ("-i", "Answer in rhyme.", "--queries", "queries.txt", "--pairs", "2", "--layer", "1", "Hi")


def test_other_queries_make_another_vector(tiny_llama, folder):
    for text in ("One.\nTwo.\n", "Three.\nFour.\n"):
        (folder / "queries.txt").write_text(text)
        run(tiny_llama, *RHYME)
    assert len(invoke("vectors", "--json").json["vectors"]) == 2


def test_a_damaged_cached_vector_is_made_again(tiny_llama, folder):
    (folder / "queries.txt").write_text("One.\nTwo.\n")
    run(tiny_llama, *RHYME)
    (path,) = (folder / "cache" / "vectors").glob("*/*.gguf")
    path.write_bytes(path.read_bytes()[:100])
    assert "made again" in run(tiny_llama, *RHYME).err
    assert "made again" not in run(tiny_llama, *RHYME).err


def test_an_instruction_of_a_file_of_ten_lines(tiny_llama, folder):
    (folder / "my.toml").write_text(
        '[[instruction]]\nid = "pirate"\nphrasings = ["Talk like a pirate.", "Answer as a pirate would."]\n'
        '[queries]\nextraction = ["One.", "Two."]\n'
    )
    done = run(tiny_llama, "-i", "pirate", "--catalog", "my.toml", "--pairs", "2", "--json", "Hi")
    assert done.json["steering"][0]["name"] == "pirate"


def test_settings_are_picked_with_the_verifier_and_kept(tiny_llama, folder):
    (folder / "my.toml").write_text(
        '[[instruction]]\nid = "small"\nverifier = "change_case:english_lowercase"\n'
        'phrasings = ["Use only lowercase letters."]\n'
        '[queries]\nextraction = ["One.", "Two."]\nvalidation = ["Three.", "Four."]\n'
    )
    args = ("-i", "small", "--catalog", "my.toml", "--pairs", "2", "Hi")
    first = run(tiny_llama, *args)
    (path,) = (folder / "cache" / "vectors").glob("*/*.gguf")
    vector = ControlVector.load(path)
    assert vector.provenance["validation"]["instruction"] == "small"
    if vector.strength == 0:  # a random model: where nothing helps, that must be said each time
        assert "nothing is applied" in first.err
        assert "nothing is applied" in run(tiny_llama, *args).err


# --- VECTOR on the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path", "strength", "layers"),
    [
        ("json.gguf", "json.gguf", None, None),
        ("json.gguf:0.8", "json.gguf", 0.8, None),
        ("json.gguf@12", "json.gguf", None, (12,)),
        ("json.gguf:0.8@12", "json.gguf", 0.8, (12,)),
        ("json.gguf:-1.5@3,7", "json.gguf", -1.5, (3, 7)),
        ("json.gguf@3-5", "json.gguf", None, (3, 4, 5)),
        (r"C:\vectors\json.gguf", r"C:\vectors\json.gguf", None, None),
        (r"C:\vectors\json.gguf:1e-1@0", r"C:\vectors\json.gguf", 0.1, (0,)),
        ("me@home/json.gguf", "me@home/json.gguf", None, None),
        ("me@home/json.gguf:2", "me@home/json.gguf", 2.0, None),
        ("a:b/json.gguf", "a:b/json.gguf", None, None),
    ],
)
def test_a_vector_has_a_file_a_strength_and_layers(text, path, strength, layers):
    assert VectorSpec.parse(text) == VectorSpec(path, strength, layers)


@pytest.mark.parametrize("name", ["json:0.8", "json@12", "json.gguf:0.8@12", "10:30"])
def test_an_existing_file_of_that_very_name_wins(folder, name):
    (folder / name).write_bytes(b"")
    assert VectorSpec.parse(name) == VectorSpec(name)
    assert VectorSpec.parse(f"{name}:2@3") == VectorSpec(name, 2.0, (3,))


@pytest.mark.parametrize("text", ["json.gguf:high", "json.gguf:", "json.gguf:nan", "json.gguf:inf@2"])
def test_a_strength_that_is_no_number_is_refused(text):
    with pytest.raises(PlanError, match="is not a strength"):
        VectorSpec.parse(text)


@pytest.mark.parametrize(
    "text", ["json.gguf@", "json.gguf@-1", "json.gguf@x", "json.gguf@5-3", "json.gguf@1,,2"]
)
def test_layers_that_are_none_are_refused(folder, text):
    (folder / "json.gguf").write_bytes(b"")
    with pytest.raises(PlanError, match="layer"):
        VectorSpec.parse(text)


@pytest.mark.parametrize("text", ["", ":0.8", "@12", ":0.8@12"])
def test_no_file_is_refused(text):
    with pytest.raises(VectorFileError, match="names no vector file"):
        VectorSpec.parse(text)


def test_a_layer_that_is_given_leaves_out_the_search(tiny_llama, folder):
    args = ("-i", "json", "--layer", "1", "--pairs", "2", "--json", "Hi")
    document = run(tiny_llama, *args)
    assert "trying layers" not in document.err
    assert document.json["steering"][0]["layers"] == [1]


def test_compare_says_which_reply_was_cut_and_how_long_each_took(tiny_llama, vector):
    said = run(tiny_llama, "-s", vector, "--compare", "--timings", "Hi").err.splitlines()
    assert [line.split(":")[1].strip() for line in said] == ["plain", "plain", "steered", "steered"]
    assert said[0] == "localsteer: plain: the reply was cut after 12 tokens: raise -n for more."
    assert "tokens, " in said[1] and "per second" in said[3]
