// Search runs in a worker, which browsers refuse to a page from disk; there a hidden frame does its work.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.inner = frame.contentWindow
      this.inner.postMessage = data => this.tell(this, data)
      this.inner.importScripts = (...urls) =>
        urls.reduce((before, next) => before.then(() => this.run(next)), Promise.resolve())
      this.ready = this.run(url)
    }
    run(url) {
      return new Promise((resolve, reject) => {
        const script = this.inner.document.createElement("script")
        script.src = new URL(url, location.href)
        script.onload = resolve
        script.onerror = reject
        this.inner.document.body.append(script)
      })
    }
    tell(target, data) {
      const event = new MessageEvent("message", { data })
      target.dispatchEvent(event)
      target.onmessage?.(event)
    }
    postMessage(data) {
      this.ready.then(() => this.tell(this.inner, data))
    }
    terminate() {
      this.inner.frameElement.remove()
    }
  }
}
