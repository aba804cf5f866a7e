"""Streamlit's login in front of every page, where ``[auth]`` is set in ``.streamlit/secrets.toml``."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

import streamlit as st

from pages.shared.text import plain

USERS_VARIABLE = "HEADROOM_ALLOWED_USERS"


def require_login() -> None:
    """Let nothing of the page be drawn before somebody who may is logged in; without ``[auth]`` everybody may.

    Who may: everyone whom the provider lets in, or the e-mail addresses in ``HEADROOM_ALLOWED_USERS``, separated by
    commas, ``*@example.com`` for all of a domain.
    """
    settings = _settings()
    if settings is None:
        return
    if not st.user.get("is_logged_in"):
        _ask(settings)
        st.stop()
    if not is_allowed(st.user, os.environ.get(USERS_VARIABLE, "")):
        who = plain(st.user.get("email") or "This account")
        st.error(f"**{who}** may not use this dashboard.", icon=":material/block:")
        st.button("Log out", icon=":material/logout:", on_click=st.logout)
        st.stop()


def is_allowed(user: Mapping[str, Any], allowed: str) -> bool:
    """True if nobody is named, or this user's verified address is.

    >>> is_allowed({"email": "Ann@example.com"}, "*@example.com"), is_allowed({"email": "a@b.org"}, "c@b.org")
    (True, False)
    """
    names = {name.strip().lower() for name in allowed.split(",") if name.strip()}
    address = str(user.get("email") or "").lower()
    _, _, domain = address.rpartition("@")
    verified = user.get("email_verified") in (None, True, "true")
    return not names or (verified and bool(domain) and bool(names & {address, f"*@{domain}"}))


def _settings() -> Mapping[str, Any] | None:
    """What ``[auth]`` says, None without it. A file that cannot be read may have one: then nothing is shown at all."""
    if st.secrets.load_if_toml_exists():
        return st.secrets.get("auth")
    for path in filter(os.path.exists, st.get_option("secrets.files")):
        st.error(f"{plain(path)} cannot be read: correct it, or remove it.", icon=":material/error:")
        st.stop()
    return None


def _ask(settings: Mapping[str, Any]) -> None:
    """The page before the login: a button a provider."""
    with st.container(border=True, horizontal_alignment="center", gap="medium"):
        st.subheader("Log in to see this dashboard", anchor=False, width="content")
        if importlib.util.find_spec("authlib") is None:
            st.error("Logging in needs the package Authlib: `pip install 'Authlib>=1.3.2'`.", icon=":material/error:")
            return
        for provider in _providers(settings):
            label = f"Log in with {plain(provider.capitalize())}" if provider else "Log in"
            arguments = (provider,) if provider else ()
            st.button(label, key=f"login-{provider}", type="primary", on_click=st.login, args=arguments)


def _providers(settings: Mapping[str, Any]) -> list[str]:
    """The names of the providers' sections; "" for one that stands in ``[auth]`` itself."""
    named = [name for name, value in settings.items() if isinstance(value, Mapping)]
    return ([""] if "client_id" in settings else []) + named
