"""report.png: the page as a browser shows it, for slides and chats."""

import logging
import shutil
import subprocess
import tempfile
from pathlib import Path

from allo_fast.config import UserError

logger = logging.getLogger(__name__)

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
_HIGHEST = 16_000  # pixels
_PATIENCE = 120  # seconds
_SCREENSHOT = "--hide-scrollbars", "--force-device-scale-factor=1"


def picture(page: Path, width: int = 1100, dark: bool = False) -> Path:
    """Beside the page, as wide as told (pixels) and as high as the page is.

    Raises UserError where no Chromium or Chrome is installed, or it fails.
    """
    from PIL import Image, ImageChops

    png = page.with_suffix(".png")
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder, "shot.png")
        asked = [f"--screenshot={shot}", f"--window-size={width},{_HIGHEST}"]
        said = browse(page, *_SCREENSHOT, *asked, f"--blink-settings=preferredColorScheme={int(not dark)}")
        if not shot.exists():
            raise UserError(f"--png: the browser made no picture: {said.strip()[-300:]}")
        with Image.open(shot) as image:
            image = image.convert("RGB")
    background = Image.new("RGB", image.size, image.getpixel((0, 0)))
    box = ImageChops.difference(image, background).getbbox()
    bottom = min((box[3] if box else 0) + 24, _HIGHEST)  # below it the window is empty
    if bottom == _HIGHEST:
        logger.warning("%s: its first %d pixels", png, _HIGHEST)
    image.crop((0, 0, width, bottom)).save(png, optimize=True)
    return png


def browse(page: Path, *asked: str) -> str:
    """What a browser without a window prints of the page. Raises UserError where none is installed."""
    if not (program := next(filter(None, map(shutil.which, (*BROWSERS, _MAC))), None)):
        raise UserError(f"--png: needs Chromium or Chrome; none of {', '.join(BROWSERS)} is installed")
    quiet = ("background-networking", "component-update", "sync", "gpu")
    with tempfile.TemporaryDirectory() as profile:
        command = [program, "--headless", "--no-sandbox", "--no-first-run", f"--user-data-dir={profile}"]
        command += [f"--disable-{name}" for name in quiet] + [*asked, page.absolute().as_uri()]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, errors="replace")
        except subprocess.TimeoutExpired:
            raise UserError(f"--png: {program} did not end within {_PATIENCE} s") from None
    return done.stdout + done.stderr
