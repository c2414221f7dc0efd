"""Questions about the newest picture of a camera, a video or a folder of stills."""
