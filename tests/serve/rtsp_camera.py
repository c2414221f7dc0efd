"""A camera for tests: GStreamer's RTSP server (Debian's gir1.2-gst-rtsp-server-1.0), with the time in its pictures.

Run by the system's Python, which has its bindings: rtsp_camera.py PORT FPS SECONDS_BETWEEN_KEY_FRAMES. A picture of
320×240 has 8×6 blocks of 40 pixels: the 48 bits of the milliseconds since 1970 at which it was made, white is 1.
"""

from __future__ import annotations

import sys
import time

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # noqa: E402

WIDTH, HEIGHT, BLOCK = 320, 240, 40


def picture(moment: float) -> bytes:
    bits = int(moment * 1000)
    rows = []
    for y in range(HEIGHT // BLOCK):
        line = b"".join((b"\xff" if bits >> (y * 8 + x) & 1 else b"\x00") * (3 * BLOCK) for x in range(WIDTH // BLOCK))
        rows.append(line * BLOCK)
    return b"".join(rows)


class Camera(GstRtspServer.RTSPMediaFactory):
    def __init__(self, fps: int, gop: float) -> None:
        super().__init__()
        self.fps, self.gop = fps, gop

    def do_create_element(self, url):
        return Gst.parse_launch(
            "( appsrc name=source is-live=true format=time do-timestamp=true caps=video/x-raw,format=RGB,"
            f"width={WIDTH},height={HEIGHT},framerate={self.fps}/1 ! videoconvert ! video/x-raw,format=I420 ! "
            f"x264enc tune=zerolatency speed-preset=ultrafast key-int-max={max(1, int(self.fps * self.gop))} ! "
            "rtph264pay name=pay0 pt=96 config-interval=1 )"
        )

    def do_configure(self, media):
        source, over = media.get_element().get_child_by_name("source"), []
        media.connect("unprepared", over.append)

        def push() -> bool:  # what comes before somebody plays it is refused, and lost
            source.emit("push-buffer", Gst.Buffer.new_wrapped(picture(time.time())))
            return not over

        GLib.timeout_add(1000 // self.fps, push)


Gst.init(None)
server = GstRtspServer.RTSPServer()
server.set_service(sys.argv[1])
server.set_address("127.0.0.1")
camera = Camera(int(sys.argv[2]), float(sys.argv[3]))
camera.set_shared(True)
server.get_mount_points().add_factory("/live", camera)
while not server.attach(None):  # the port is still held by connections of the camera that was killed
    time.sleep(0.1)
print("ready", flush=True)
GLib.MainLoop().run()
