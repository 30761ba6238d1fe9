// What the page does in the browser, in addition to Gradio: it marks an answer whose note has
// changed, submits on Ctrl+Enter, and scrolls to a new answer where it is out of sight.
(() => {
  let submitted = null; // the note that was submitted last
  let answered = null; // the note of the answer that is shown
  let shown = null; // the id of that answer

  const note = () => document.querySelector("#note textarea");
  const answer = () => document.querySelector("#card [id^=answer-]");

  function remember() {
    submitted = note().value;
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
    const id = answer()?.id ?? null;
    if (id !== null && id !== shown) {
      answered = submitted;
      scrollToAnswer();
    }
    shown = id;
    const isStale = id !== null && note().value !== answered;
    for (const part of document.querySelectorAll(".answer")) {
      part.classList.toggle("stale", isStale);
    }
  }

  document.addEventListener("click", (event) => {
    if (event.target.closest("#submit") !== null) {
      remember();
    } else if (event.target.closest("#undo") !== null) {
      note().focus(); // the button disappears
    }
  }, true);

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
