"""The page itself; gradio is an extra. What it shows is tested in `test_session.py`, which needs none."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dpt_t2i.cli import main
from dpt_t2i.errors import InputError
from dpt_t2i.publish.session import Session
from tests.publish.test_session import HOW, PROMPT, model


def test_without_gradio_one_line_says_how_to_get_it():
    code = (
        "import sys; sys.modules['gradio'] = None\n"
        "from dpt_t2i.cli import main; sys.exit(main(['app', '--device', 'cpu']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: dpt app needs gradio: pip install 'dpt-t2i[app]'"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page over a tiny tuned model, its address, and the folder."""
    pytest.importorskip("gradio")
    from dpt_t2i.publish.app import build, serve

    folder = tmp_path_factory.mktemp("app")
    page = build(Session(model(), folder))
    yield page, serve(page, "127.0.0.1", 0), folder
    page.close()


@pytest.fixture(scope="module")
def client(page):
    from gradio_client import Client

    return Client(page[1], verbose=False)


CONTROLS = [0.2, 1, 3, 2.0, 0.0, "ddim", "", 32, 32, "relative", "state", 0.0, 1.0]


def test_a_prompt_gives_two_pictures_their_files_and_what_speaks_for_them(page, client):
    folder = page[2]
    left, right, both, verdict, evidence, curve, files, seed = client.predict(
        PROMPT, 7, False, "plain base", True, *CONTROLS, api_name="/draw"
    )
    drawing = Session(model(), folder / "by_hand").draw(PROMPT, 7, "plain base", HOW)
    for shown, drawn in ((left, drawing.beside), (right, drawing.steered)):
        with Image.open(shown) as image:
            assert image.convert("RGB").tobytes() == drawn.shown(boxes=True).tobytes()
    assert len(both) == 2 and seed == 7 and "seed **7**" in verdict
    assert f"{drawing.steered.judgement.score:.3f}" in verdict and f"{drawing.beside.judgement.score:.3f}" in verdict
    assert [row[0] for row in evidence["data"]] == ["red circle", "blue square"]
    points = curve["value"] if "value" in curve else curve
    assert [row[0] for row in points["data"]] == [1, 2, 3]
    assert [Path(name).name for name in files] == ["base_00000_7.png", "tuned+correct_00000_7.png"]
    kept = [folder / "base/images/00000_7.png", folder / "tuned+correct/images/00000_7.png"]
    assert [Path(name).read_bytes() for name in files] == [file.read_bytes() for file in kept]


def test_the_folder_itself_is_not_handed_out(page, client):
    """What was drawn before, by whomever, and whatever else lies there."""
    import requests

    (page[2] / "secret.txt").write_text("secret")
    for path in (page[2] / "secret.txt", page[2] / "base/images/00000_7.png"):
        answer = requests.get(f"{page[1]}gradio_api/file={path}")
        assert answer.status_code == 403, path


def test_gradio_writes_nothing_beside_the_source(page):
    import dpt_t2i.publish.app

    assert not Path(dpt_t2i.publish.app.__file__).with_suffix(".pyi").exists()


def test_no_tunnel_is_opened_and_nothing_recorded(monkeypatch, tmp_path):
    pytest.importorskip("gradio")
    from dpt_t2i.publish.app import build, serve

    page, asked = build(Session(model(), tmp_path)), {}
    monkeypatch.setattr(page, "launch", lambda **how: asked.update(how) or (None, "url", None))
    assert serve(page, "127.0.0.1", 0) == "url"
    assert asked["share"] is False and asked["run_history"] is False and asked["server_name"] == "127.0.0.1"
    assert not asked.get("allowed_paths") and 0 < asked["server_port"] < 2**16


def test_a_picture_is_judged(page, client, tmp_path):
    from gradio_client import handle_file

    picture = Image.new("RGB", (32, 32), "red")
    picture.save(tmp_path / "red.png")
    _, verdict, evidence = client.predict(handle_file(tmp_path / "red.png"), PROMPT, 250, 2, api_name="/judge")
    assert f"**{model().score(picture, PROMPT, 250, 2).score:.3f}**" in verdict
    assert [row[0] for row in evidence["data"]] == ["red circle", "blue square"]


def test_bad_input_reaches_the_page_as_one_line(client, tmp_path):
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError, match="height 33 must be a positive multiple of 4"):
        client.predict(PROMPT, 7, False, "nothing", True, *CONTROLS[:7], 33, *CONTROLS[8:], api_name="/draw")
    with pytest.raises(AppError, match="the prompt is empty"):
        client.predict(" ", 7, False, "nothing", True, *CONTROLS, api_name="/draw")
    with pytest.raises(AppError, match="the seed is empty"):
        client.predict(PROMPT, None, False, "nothing", True, *CONTROLS, api_name="/draw")
    with pytest.raises(AppError, match="there is no picture"):
        client.predict(None, PROMPT, 250, 2, api_name="/judge")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(AppError, match="none of them may be empty"):
        client.predict(handle_file(tmp_path / "a.png"), PROMPT, None, 2, api_name="/judge")
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(AppError, match="the picture cannot be read"):
        client.predict(handle_file(tmp_path / "b.png"), PROMPT, 250, 2, api_name="/judge")


def test_a_taken_port_is_one_line(page, tmp_path, capsys):
    from dpt_t2i.publish.app import build, serve

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"127.0.0.1:{port}.* another --host or --port"):
            serve(build(Session(model(), tmp_path)), "127.0.0.1", port)
        with pytest.raises(InputError, match="nothing can listen on 192.0.2.1:0"):  # of nobody: RFC 5737
            serve(build(Session(model(), tmp_path)), "192.0.2.1", 0)
        assert main(["app", "--device", "cpu", "--port", str(port), "--output_dir", str(tmp_path)]) == 2
    assert f"127.0.0.1:{port}" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_model_without_adapter_has_no_tab_to_judge(tmp_path):
    pytest.importorskip("gradio")
    from dpt_t2i.publish.app import build

    told = str(build(Session(model(lora=False, adapter=False), tmp_path)).get_config_file())
    assert "'Judge'" not in told and "no scores, no correction" in told
