"""report.png: the page as a browser shows it, for slides and chats."""

import shutil
import subprocess
import tempfile
from pathlib import Path

from allo_fast.config import UserError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_HIGHEST = 16_000  # pixels
_SCREENSHOT = "--hide-scrollbars", "--force-device-scale-factor=1"


def picture(page: Path, width: int = 1100, dark: bool = False) -> Path:
    """Beside the page, as wide as told (pixels) and as high as the page is.

    Raises UserError where no Chromium or Chrome is installed, or it fails.
    """
    from PIL import Image, ImageChops

    png = page.with_suffix(".png")
    png.unlink(missing_ok=True)
    asked = [f"--screenshot={png.absolute()}", f"--window-size={width},{_HIGHEST}"]
    said = browse(page, *_SCREENSHOT, *asked, f"--blink-settings=preferredColorScheme={int(not dark)}")
    if not png.exists():
        raise UserError(f"--png: the browser made no picture: {said.strip()[-300:]}")
    with Image.open(png) as image:
        image = image.convert("RGB")
    background = Image.new("RGB", image.size, image.getpixel((0, 0)))
    bottom = ImageChops.difference(image, background).getbbox()[3]  # below it the window is empty
    image.crop((0, 0, width, min(bottom + 24, _HIGHEST))).save(png, optimize=True)
    return png


def browse(page: Path, *asked: str) -> str:
    """What a browser without a window prints of the page. Raises UserError where none is installed."""
    if not (program := next(filter(None, map(shutil.which, BROWSERS)), None)):
        raise UserError(f"--png: needs Chromium or Chrome; none of {', '.join(BROWSERS)} is installed")
    quiet = ("background-networking", "component-update", "sync", "gpu")
    with tempfile.TemporaryDirectory() as profile:
        command = [program, "--headless", "--no-sandbox", "--no-first-run", f"--user-data-dir={profile}"]
        command += [f"--disable-{name}" for name in quiet] + [*asked, page.absolute().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, errors="replace")
    return done.stdout + done.stderr
