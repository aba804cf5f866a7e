"""The login in front of the pages: nothing is shown before it where ``[auth]`` is set, everything without it."""

from __future__ import annotations

import importlib.util

import pytest
from streamlit.testing.v1 import AppTest

from pages.login import is_allowed
from tests.pages.engine_fakes import PAGES

AUTH = {
    "redirect_uri": "https://gpu.example.com/oauth2callback",
    "cookie_secret": "x" * 32,
    "client_id": "headroom",
    "client_secret": "secret",
    "server_metadata_url": "https://login.example.com/.well-known/openid-configuration",
}


@pytest.fixture
def page(services, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # no secrets file of this machine's own
    monkeypatch.setenv("HEADROOM_HOME", str(tmp_path))
    monkeypatch.delenv("HEADROOM_ALLOWED_USERS", raising=False)
    return AppTest.from_file(str(PAGES / "frame.py"), default_timeout=30)


@pytest.fixture
def authlib(monkeypatch):
    """As if Authlib were there."""
    real = importlib.util.find_spec
    found = importlib.util.find_spec("json")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found if name == "authlib" else real(name))


def is_shown(page):
    assert not page.exception
    return any("Llama-3.1-70B" in item.value for item in page.subheader)


def test_without_auth_the_pages_are_shown_at_once(page):
    assert is_shown(page.run())


def test_with_auth_nothing_is_shown_before_the_login(page, client, authlib):
    page.secrets["auth"] = AUTH
    page.run()
    assert not is_shown(page)
    assert [button.label for button in page.button] == ["Log in"]
    assert "fake-135m" not in str(page)


def test_each_named_provider_has_a_button(page, authlib):
    general = {name: AUTH[name] for name in ("redirect_uri", "cookie_secret")}
    page.secrets["auth"] = general | {"google": AUTH, "okta": AUTH}
    assert [button.label for button in page.run().button] == ["Log in with Google", "Log in with Okta"]


def test_with_auth_and_without_authlib_nothing_is_shown_but_what_is_missing(page, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    page.secrets["auth"] = AUTH
    page.run()
    assert not page.button
    assert "Authlib" in page.error[0].value


def test_who_is_logged_in_sees_the_pages(page):
    page.secrets["auth"] = AUTH
    page.user = {"is_logged_in": True, "email": "ann@example.com"}
    assert is_shown(page.run())


def test_who_is_not_named_is_shown_nothing_but_the_way_out(page, monkeypatch):
    monkeypatch.setenv("HEADROOM_ALLOWED_USERS", "bob@example.com")
    page.secrets["auth"] = AUTH
    page.user = {"is_logged_in": True, "email": "ann@example.com"}
    page.run()
    assert not is_shown(page)
    assert [button.label for button in page.button] == ["Log out"]
    page.user = {"is_logged_in": True, "email": "bob@example.com"}
    assert is_shown(page.run())


def test_secrets_that_cannot_be_read_show_nothing(page, tmp_path, monkeypatch):
    broken = tmp_path / "secrets.toml"
    broken.write_text("[auth\nclient_id =")
    from streamlit import config

    real = config.get_option("secrets.files")
    config.set_option("secrets.files", [str(broken)])
    try:
        page.run()
    finally:
        config.set_option("secrets.files", real)
    assert not is_shown(page)
    assert "cannot be read" in page.error[0].value


@pytest.mark.parametrize(
    ("user", "allowed", "may"),
    [
        ({}, "", True),
        ({}, "ann@example.com", False),
        ({"email": "ANN@example.com"}, "ann@example.com", True),
        ({"email": "ann@example.com"}, " *@example.com ", True),
        ({"email": "ann@evil.example.com"}, "*@example.com", False),
        ({"email": "ann@evilexample.com"}, "*@example.com", False),
        ({"email": "ann@example.com", "email_verified": False}, "*@example.com", False),
        ({"email": ""}, "*@", False),
    ],
)
def test_the_list_of_users_lets_in_whom_it_names(user, allowed, may):
    assert is_allowed(user, allowed) is may
