// Starts the interactive figures of a page. Only pages that have one load this file.
//
// The widget scripts are large, so they are fetched when the first figure comes near the screen
// (or gets the focus), from this site. Until then the reader sees the figure's first frame, which
// the build put into the page.
(function () {
  "use strict";
  const site = document.currentScript.src.replace(/[^/]*$/, "");
  window.__jupyter_widgets_assets_path__ = site + "offline/widgets/";
  // The theme's icon script would replace the <i> elements that widget buttons change themselves.
  window.FontAwesomeConfig = { observeMutations: false };

  let started = false;

  function start() {
    if (started) return;
    started = true;
    bridgeMathJax();
    const script = document.createElement("script");
    script.src = site + "offline/widgets/embed.js";
    // The script waits for the page's "load" event; when that is over, it must not wait.
    const listen = window.addEventListener;
    if (document.readyState === "complete") {
      window.addEventListener = function (type, callback, options) {
        if (type === "load" && document.currentScript === script) callback();
        else listen.call(window, type, callback, options);
      };
    }
    script.onload = script.onerror = function () { window.addEventListener = listen; };
    document.head.append(script);
  }

  // ipywidgets calls MathJax 2; this page has MathJax 3.
  function bridgeMathJax() {
    const math = window.MathJax;
    if (!math || math.Hub || !math.startup) return;
    math.Hub = {
      Queue: function (job) {
        math.startup.promise.then(function () { return math.typesetPromise([job[2]]); });
      },
    };
  }

  // A drawn figure takes the place of its first frame.
  function replaceFirstFrames() {
    document.querySelectorAll(".first-frame + .widget-subarea > *").forEach(function (drawn) {
      drawn.parentElement.previousElementSibling.remove();
    });
  }

  document.addEventListener("DOMContentLoaded", function () {
    const main = document.querySelector("main") || document.body;
    new MutationObserver(replaceFirstFrames).observe(main, { childList: true, subtree: true });
    const places = document.querySelectorAll(
      ".first-frame, script[type='application/vnd.jupyter.widget-view+json']"
    );
    const seen = new IntersectionObserver(function (entries) {
      if (entries.some(function (entry) { return entry.isIntersecting; })) {
        seen.disconnect();
        start();
      }
    }, { rootMargin: "1500px 0px" });
    places.forEach(function (place) {
      // A <script> has no box; its parent has.
      seen.observe(place.tagName === "SCRIPT" ? place.parentElement : place);
    });
    window.addEventListener("beforeprint", start);
  });
})();
