"""A browser without a window, which opens pages as a reader would."""

from collections.abc import Iterator
from pathlib import Path
from shutil import which

import pytest


class Browser:
    """Chromium, with the scheme that the system is said to prefer."""

    def __init__(self, profile: Path):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = which("chromium")
        for flag in (
            *("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking"),
            *("disable-component-update", "disable-sync", "window-size=1200,900", f"user-data-dir={profile}"),
        ):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(which("chromedriver")))
        self.driver.set_script_timeout(300)  # a busy machine is slow, and no error of a page's

    def open(self, file: Path, scheme: str = "light") -> None:
        """Open a page as one that has never been opened before."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.execute_cdp_cmd(
            "Storage.clearDataForOrigin", {"origin": "file://", "storageTypes": "local_storage"}
        )
        self.driver.get_log("browser")
        self.driver.get(file.as_uri())

    def run(self, script: str, *args):
        """What a function with this JavaScript as its body returns."""
        return self.driver.execute_script(script, *args)

    def style(self, selector: str, name: str) -> str:
        """What a property of the first such element has become."""
        return self.run(
            "return getComputedStyle(document.querySelector(arguments[0])).getPropertyValue(arguments[1])",
            *(selector, name),
        )

    def press(self, *keys: str) -> None:
        """Press keys one after another, wherever the focus is."""
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def errors(self) -> list[str]:
        """What the browser had to say against the page since it was opened."""
        return [entry["message"] for entry in self.driver.get_log("browser")]


def browsers(profile: Path) -> Iterator[Browser]:
    """One browser for a session of tests, which are skipped where there is none."""
    pytest.importorskip("selenium")
    for program in ("chromium", "chromedriver"):
        if which(program) is None:
            pytest.skip(f"needs {program}")
    browser = Browser(profile)
    yield browser
    browser.driver.quit()
