/** Pictures as the model takes them: files, gallery images and camera frames → uint8 [3, size, size]. */

import { cropSquare, fitSquare } from "./resize.js";

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
  const ground = `rgb(${settings.background.join(" ")})`;
  const source = {
    width,
    height,
    read(x, y, w, h) {
      canvas.width = w; // clears it, too
      canvas.height = h;
      context.fillStyle = ground;
      context.fillRect(0, 0, w, h);
      context.drawImage(image, x, y, w, h, 0, 0, w, h);
      return context.getImageData(0, 0, w, h).data;
    },
  };
  if (settings.fit === "letterbox") return fitSquare(padded(source, settings.padding), settings.image_size);
  if (settings.fit === "squash") return fitSquare(source, settings.image_size);
  return cropSquare(source, settings.image_size, settings.longest);
}

/** A picture with bars of a color that make it a square. */
export function padded(source, [r, g, b]) {
  const side = Math.max(source.width, source.height);
  const left = Math.floor((side - source.width) / 2);
  const top = Math.floor((side - source.height) / 2);
  return {
    width: side,
    height: side,
    read(x, y, w, h) {
      const all = new Uint8ClampedArray(w * h * 4);
      for (let i = 0; i < all.length; i += 4) [all[i], all[i + 1], all[i + 2]] = [r, g, b];
      const [x0, x1] = [Math.max(x, left), Math.min(x + w, left + source.width)];
      const [y0, y1] = [Math.max(y, top), Math.min(y + h, top + source.height)];
      if (x0 >= x1 || y0 >= y1) return all;
      const part = source.read(x0 - left, y0 - top, x1 - x0, y1 - y0);
      for (let row = y0; row < y1; row++) {
        const from = (row - y0) * (x1 - x0) * 4;
        all.set(part.subarray(from, from + (x1 - x0) * 4), ((row - y) * w + x0 - x) * 4);
      }
      return all;
    },
  };
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
