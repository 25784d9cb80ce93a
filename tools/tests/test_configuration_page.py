from __future__ import annotations

import configuration_page


def test_the_reference_page_is_what_the_settings_say():
    written = configuration_page.PAGE.read_text(encoding="utf-8")
    assert written == configuration_page.page(), "run: uv run python tools/configuration_page.py"
