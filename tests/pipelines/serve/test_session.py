import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from moray.pipelines.serve.session import open_session
from moray.platform.core.errors import InputError
from moray.platform.core.ports import check_port, free_port


def test_a_folder_without_a_model_is_refused_before_ray_is_used(tmp_path):
    with pytest.raises(InputError, match=r"contains no config\.json"):
        open_session(tmp_path, "none", port=1)


def get(url: str) -> dict:
    with urllib.request.urlopen(url, timeout=10) as response:
        return json.load(response)


def test_a_port_taken_in_the_meantime_is_one_clear_error(ray_cluster, folder, capfd):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port()))
        listener.listen()
        with pytest.raises(InputError, match="is in use"):
            open_session(folder, "tiny", "127.0.0.1", listener.getsockname()[1])
    assert capfd.readouterr() == ("", "")


def test_deploy_twice_drain_and_stop(ray_cluster, folder, capfd):
    port = free_port()
    session = open_session(folder, "tiny", "127.0.0.1", port)
    try:
        card = get(f"{session.url}/v1/models")["data"][0]
        assert card["id"] == "tiny"
        assert open_session(folder, "tiny", "127.0.0.1", port) == session
        assert get(f"{session.url}/v1/models")["data"][0] == card  # `created` too: the replica is the same
        with pytest.raises(InputError, match="already runs on this cluster"):
            open_session(folder, "tiny", "127.0.0.1", free_port())
        beside = open_session(folder, "Second one")  # joins the instance that runs
        assert beside.url == session.url
        assert [card["id"] for card in get(f"{beside.url}/v1/models")["data"]] == ["second-one", "tiny"]
        beside.stop()
        assert [card["id"] for card in get(f"{session.url}/v1/models")["data"]] == ["tiny"]
        import openai  # takes two seconds, which tests of other files would wait for

        client = openai.OpenAI(base_url=f"{session.url}/v1", api_key="none", max_retries=0)
        stream = iter(client.completions.create(model="tiny", prompt="In", max_tokens=200, temperature=0, stream=True))
        next(stream)
        with ThreadPoolExecutor(1) as pool:
            stopping = pool.submit(session.stop)
            assert [chunk.choices[0].finish_reason for chunk in stream][-1] in ("length", "stop")
            stopping.result()
    finally:
        session.stop()  # again: no error
    check_port("127.0.0.1", port)
    assert capfd.readouterr() == ("", "")


@pytest.mark.ray  # of its own
def test_ctrl_c_ends_serve_without_an_error(folder, tmp_path):
    command = [
        sys.executable,
        "-c",
        "from moray.platform.cli.main import main; main()",
        "serve",
        str(folder),
        "--port",
        "0",
    ]
    environment = {**os.environ, "MORAY_HOME": str(tmp_path / "home")}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as served:
        assert "serving" in served.stdout.readline()
        served.send_signal(signal.SIGINT)
        _, said = served.communicate()
    assert served.returncode == 0
    assert said.splitlines()[-1] == "stopped"
    assert "error" not in said


def test_a_model_that_does_not_load_is_an_error_with_the_reason(ray_cluster, folder, capfd):
    (folder / "model.safetensors").write_bytes(b"not weights")
    port = free_port()
    with pytest.raises(InputError, match=r"model\.safetensors is not a safetensors file"):
        open_session(folder, "broken", "127.0.0.1", port)
    check_port("127.0.0.1", port)  # nothing is left
    assert capfd.readouterr() == ("", "")
