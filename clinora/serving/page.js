// What the page does in the browser, in addition to Gradio: it marks an answer whose note has
// changed, submits on Ctrl+Enter, and scrolls to a new answer where it is out of sight.
(() => {
  let shown = ""; // the id of the answer that is shown
  let read = null; // the note that was read last, and its fingerprint
  let readFingerprint = 0;

  const note = () => document.querySelector("#note textarea");
  const answer = () => document.querySelector("#card [id^=answer-]");

  // The same as fingerprint in answer.py: CRC-32 of the text in UTF-16.
  function fingerprint(text) {
    if (text === read) {
      return readFingerprint;
    }
    let crc = -1;
    for (let i = 0; i < 2 * text.length; i++) {
      crc ^= (text.charCodeAt(i >> 1) >> (8 * (i & 1))) & 255;
      for (let bit = 0; bit < 8; bit++) {
        crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
      }
    }
    read = text;
    readFingerprint = ~crc >>> 0;
    return readFingerprint;
  }

  function scrollToAnswer() {
    const box = answer().getBoundingClientRect();
    if (box.top < 0 || box.bottom > innerHeight) {
      answer().scrollIntoView({ block: "start" });
    }
  }

  function compare() {
    if (note() === null) {
      return; // another tab is open, or Gradio has not built the page yet
    }
    const id = answer()?.id ?? "";
    if (id !== "" && id !== shown) {
      scrollToAnswer();
    }
    shown = id;
    const isStale = id !== "" && !id.startsWith(`answer-${fingerprint(note().value)}-`);
    for (const part of document.querySelectorAll(".answer")) {
      part.classList.toggle("stale", isStale);
    }
  }

  document.addEventListener("click", (event) => {
    if (event.target.closest("#undo") !== null) {
      note().focus(); // the button disappears
    }
  });

  document.addEventListener("keydown", (event) => {
    const isSubmit = event.key === "Enter" && (event.ctrlKey || event.metaKey);
    if (isSubmit && event.target === note()) {
      event.preventDefault();
      document.querySelector("#submit").click();
    }
  });

  // Gradio tells the document nothing when it sets the note or the answer: hence the interval.
  document.addEventListener("input", compare);
  setInterval(compare, 200);
})();
