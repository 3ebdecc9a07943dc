"""pacs.yaml: what is misspelt or unsafe is refused by its line; secrets stay private."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from consilium_client.data.cli import data_app
from consilium_client.data.pacs.config import (
    EXAMPLE,
    DimseConfig,
    WebConfig,
    load_archive,
    parse_pacs,
    read_secret,
)
from consilium_common.errors import ConsiliumError

DIMSE = "kind: dimse, host: 127.0.0.1, port: 104, called_ae: A"
WEB = "kind: dicomweb, url: 'https://a.example/dw'"


def entry(text: str) -> str:
    return f"schema: consilium/pacs/v1\narchives:\n  a: {{{text}}}\n"


def test_the_example_is_valid_and_its_paths_start_from_the_file(tmp_path: Path) -> None:
    archives = parse_pacs(EXAMPLE, tmp_path / "pacs.yaml").archives
    pacs, web = archives["pacs"], archives["web"]
    assert isinstance(pacs, DimseConfig) and isinstance(web, WebConfig)
    assert pacs.tls is not None and pacs.tls.ca == str(tmp_path / "identity" / "pacs-ca.pem")
    assert web.password_file == str(tmp_path / "identity" / "pacs-password")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (entry(f"{DIMSE}, retreive: c-get"), "unknown key archives.a.retreive"),
        (entry(DIMSE.replace("127.0.0.1", "pacs.example")), "insecure: true"),
        (entry(f"{DIMSE}, retrieve: c-move"), "c-move needs receive"),
        (entry(f"{DIMSE}, tls: {{ca: x.pem, key: y.pem}}"), "belong together"),
        (
            entry(f"{DIMSE}, retrieve: c-move, receive: {{port: 11112}}, tls: {{ca: x.pem}}"),
            "we are the server then",
        ),
        (entry(DIMSE.replace("port: 104", "port: 70000")), "archives.a.port"),
        (entry(DIMSE.replace("called_ae: A", f"called_ae: {'A' * 17}")), "called_ae"),
        (entry(WEB.replace("https", "http")), "https, or say insecure: true"),
        (entry(WEB.replace("a.example", "me:secret@a.example")), "archives.a.url"),
        (entry(f"{WEB}, user: me"), "belong together"),
        (entry(f"{WEB}, user: me, password_file: p, token_file: t"), "not both"),
        (entry("kind: ftp"), "archives.a"),
        (entry(WEB) + f"  a: {{{DIMSE}}}\n", "keep one of them"),
        (entry(WEB.replace("kind: dicomweb", "kind: &k dicomweb")), "no anchors"),
        ("", "plain YAML"),
    ],
)
def test_what_is_wrong_in_the_file_is_named_with_its_line(
    tmp_path: Path, text: str, said: str
) -> None:
    with pytest.raises(ConsiliumError) as caught:
        parse_pacs(text, tmp_path / "pacs.yaml")
    assert caught.value.code == "pacs.file" and said in caught.value.message
    assert "pacs.yaml" in caught.value.where and "secret" not in caught.value.message


def test_loopback_and_an_explicit_word_permit_a_connection_without_tls(tmp_path: Path) -> None:
    for text in (
        DIMSE,
        DIMSE.replace("127.0.0.1", "pacs.example, insecure: true"),
        WEB.replace("https://a.example", "http://localhost:8042"),
    ):
        assert parse_pacs(entry(text), tmp_path / "pacs.yaml").archives["a"].kind


def test_an_archive_is_chosen_by_name_or_is_the_only_one(tmp_path: Path) -> None:
    with pytest.raises(ConsiliumError) as caught:
        load_archive(tmp_path, "a")
    assert caught.value.code == "pacs.no-file" and "--init" in caught.value.hint
    (tmp_path / "pacs.yaml").write_text(entry(DIMSE))
    assert load_archive(tmp_path, "") == load_archive(tmp_path, "a")
    (tmp_path / "pacs.yaml").write_text(EXAMPLE)
    for name in ("", "a"):
        with pytest.raises(ConsiliumError) as caught:
            load_archive(tmp_path, name)
        assert caught.value.code == "pacs.unknown-archive" and "pacs, web" in caught.value.hint


def test_a_secret_is_one_private_line(tmp_path: Path) -> None:
    path = tmp_path / "password"
    for content, mode in (
        (None, 0),
        ("word", 0o640),
        ("word", 0o604),
        ("", 0o600),
        ("a\nb", 0o600),
    ):
        if content is not None:
            path.write_text(content)
            path.chmod(mode)
        with pytest.raises(ConsiliumError) as caught:
            read_secret(str(path))
        assert caught.value.code == "pacs.secret" and "word" not in caught.value.message
    path.write_text("word of mouth\n")
    assert read_secret(str(path)) == "word of mouth"


def test_init_writes_the_example_once_and_wrong_calls_are_one_error(tmp_path: Path) -> None:
    def call(*arguments: str) -> tuple[int, str]:
        answer = CliRunner().invoke(data_app, ["pull", *arguments, "--home", str(tmp_path / "h")])
        return answer.exit_code, answer.stdout + answer.stderr

    assert call("a", "out")[0] == 8  # no site
    assert call("--init")[0] == 0
    path = tmp_path / "h" / "pacs.yaml"
    assert path.read_text() == EXAMPLE and path.stat().st_mode & 0o777 == 0o600
    assert call("--init")[0] == 11
    path.write_text(entry(DIMSE.replace("104", "1")))
    for arguments, status, said in (
        (("a", "out"), 2, "whole archive"),
        (("a", "--modality", "CT"), 2, "Where should the images go"),
        (("a", "out", "--from", "1.2.2024"), 2, "not a date"),
        (("a", "out", "--modality", "c-t"), 2, "modality"),
        (("a", "out", "--patients", "no-such-list"), 2, "cannot be opened"),
        (("a", "out", "--patients", "-", "--accessions", "-"), 2, "Only one"),
        (("a", "out", "--modality", "CT"), 11, "cannot be reached"),
    ):
        found = call(*arguments)
        assert found[0] == status and said in found[1], (arguments, found)
