// Search in pages that are read from a disk. Browsers start no worker from a file:// address, so it
// is started from its text, which docs/site_hooks.py puts into the place of SOURCE.
if (location.protocol === "file:") {
  const source = SOURCE
  window.Worker = class extends Worker {
    constructor() {
      super(URL.createObjectURL(new Blob([source], { type: "text/javascript" })))
    }
  }
}
