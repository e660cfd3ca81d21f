/** The camera, frame by frame. */

const video = document.getElementById("video");

export class Camera {
  #stream = null;

  get on() {
    return this.#stream !== null;
  }

  /** Starts it; throws an Error with a sentence for the user. */
  async start() {
    if (!navigator.mediaDevices) {
      throw new Error("The camera needs a secure page: open it from https://, or from localhost");
    }
    try {
      const wanted = { video: { facingMode: "environment", width: { ideal: 640 } }, audio: false };
      this.#stream = await navigator.mediaDevices.getUserMedia(wanted);
    } catch (error) {
      throw new Error(`The camera cannot be used here (${error.name}): allow it in the browser, or choose files`);
    }
    video.srcObject = this.#stream;
    await video.play();
    video.hidden = false;
  }

  stop() {
    for (const track of this.#stream?.getTracks() ?? []) track.stop();
    this.#stream = null;
    video.srcObject = null;
    video.hidden = true;
  }

  /** The present frame {image, width, height}; null before the first. */
  frame() {
    return video.videoWidth ? { image: video, width: video.videoWidth, height: video.videoHeight } : null;
  }
}
