// The calculator of trainable parameters. Every count is a straight line over the chosen size; the
// lines come from llm_anatomy.peft.counts, with the page.
document.querySelectorAll("form.la-form[hidden]").forEach(function (form) {
  "use strict";
  const data = JSON.parse(form.dataset.numbers);
  const result = form.nextElementSibling;
  const cells = result.querySelectorAll("td");
  const knob = form.elements.size.closest("label");

  function whole(value) { return value.toLocaleString("en-US"); }
  function digits(value) {
    return value.toFixed(value === 0 ? 0 : Math.max(0, 2 - Math.floor(Math.log10(value))));
  }
  function size(bytes) {
    const unit = [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]].find(function (u) { return bytes >= u[1]; });
    return unit ? digits(bytes / unit[1]) + " " + unit[0] : bytes + " bytes";
  }
  function chosen(name) {
    const list = form.elements[name];
    return list.options[list.selectedIndex].text.trim();
  }
  function update(event) {
    const method = +form.elements.method.value;
    const [name, inside] = [data.methods[method][0], data.methods[method][2]];
    const [, all, lines] = data.models[+form.elements.model.value];
    const [fixed, slope, storedFixed, storedSlope, most] = lines[method];
    const input = form.elements.size;
    if (event && event.target.name === "method") input.value = data.methods[method][1];
    knob.hidden = !name;
    knob.querySelector("span").textContent = name;
    input.max = most;
    const n = name ? Number(input.value) : 1;
    const status = result.querySelector("[role=status]");
    if (!Number.isInteger(n) || n < 1 || n > most) {
      status.textContent = name + " must be a whole number from 1 to " + whole(most) + ".";
      cells.forEach(function (cell) { cell.textContent = "–"; });
      return;
    }
    const bytes = form.elements.numbers.value === "0" ? 4 : 2;
    const trained = fixed + slope * n;
    const values = [
      whole(all), whole(trained), digits(100 * trained / all) + " %",
      size(bytes * (storedFixed + storedSlope * n)),
      size(bytes * (inside ? all : all + trained)), size(3 * bytes * trained),
    ];
    cells.forEach(function (cell, i) { cell.textContent = values[i]; });
    status.textContent = chosen("model") + ", " + chosen("method")
      + (name ? ", " + name + " = " + n : "") + ", " + bytes + " bytes a number"
      + (trained ? "" : ": this model has no biases, so nothing trains");
  }
  form.addEventListener("input", update);
  form.addEventListener("submit", function (event) { event.preventDefault(); });
  form.hidden = false;
  update();
});
