/** Pictures as the model takes them: files, gallery images and camera frames → uint8 [3, size, size]. */

import { fitSquare } from "./resize.js";

const canvas = document.createElement("canvas");
const context = canvas.getContext("2d", { willReadFrequently: true });

/** The pixels of a picture file (a Blob): upright, RGB, on the page's ground where it is transparent.
 *
 * The browser reads the EXIF orientation.  Throws an Error with a sentence for the user.
 */
export async function pixelsOfFile(blob, name, settings) {
  let bitmap;
  try {
    // Embedded color profiles are passed over, as in training.
    bitmap = await createImageBitmap(blob, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  } catch {
    throw new Error(`${name} cannot be read as an image by this browser: try JPEG, PNG or WebP`);
  }
  try {
    if (bitmap.width * bitmap.height > settings.max_pixels) {
      throw new Error(`${name} has ${bitmap.width} × ${bitmap.height} pixels, more than are decoded: make it smaller`);
    }
    return pixelsOf(bitmap, bitmap.width, bitmap.height, settings);
  } finally {
    bitmap.close();
  }
}

/** The pixels of what a canvas can draw (an ImageBitmap, a video's present frame). */
export function pixelsOf(image, width, height, settings) {
  const [r, g, b] = settings.background;
  const source = {
    width,
    height,
    read(x, y, w, h) {
      canvas.width = w; // clears it, too
      canvas.height = h;
      context.fillStyle = `rgb(${r}, ${g}, ${b})`;
      context.fillRect(0, 0, w, h);
      context.drawImage(image, x, y, w, h, 0, 0, w, h);
      return context.getImageData(0, 0, w, h).data;
    },
  };
  return fitSquare(source, settings.image_size, settings.longest);
}

/** Draws pixels [3, size, size] on a canvas of that size. */
export function draw(target, pixels, size) {
  const area = size * size;
  const data = new ImageData(size, size);
  for (let i = 0; i < area; i++) {
    for (let c = 0; c < 3; c++) data.data[4 * i + c] = pixels[c * area + i];
    data.data[4 * i + 3] = 255;
  }
  target.width = target.height = size;
  target.getContext("2d").putImageData(data, 0, 0);
}
