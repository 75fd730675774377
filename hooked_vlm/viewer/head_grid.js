// All heads as a table of buttons. Emits "choose" with a layer and a head, or with head null for a whole layer.
export default {
  props: { layers: Number, heads: Number, factors: Object },
  emits: ["choose"],
  data: () => ({ at: [0, 0] }), // the one cell that Tab reaches; arrows move it
  template: `
    <table :class="['head-grid', { compact: heads > 16 }]" @keydown="move">
      <caption class="soft">rows: layers, columns: heads</caption>
      <thead><tr><td></td><th v-for="head in heads" scope="col">{{ head - 1 }}</th></tr></thead>
      <tbody>
        <tr v-for="(_, layer) in layers">
          <th scope="row"><button type="button" tabindex="-1" :aria-label="'all heads of layer ' + layer"
            @click="$emit('choose', { layer, head: null })">{{ layer }}</button></th>
          <td v-for="(_, head) in heads"><button type="button" :class="look(layer, head)" :data-head="layer + '.' + head"
            :aria-label="'layer ' + layer + ', head ' + head + ': ' + said(layer, head)" :title="layer + '.' + head + ': ' + said(layer, head)"
            :aria-pressed="String(factor(layer, head) !== undefined)"
            :tabindex="at[0] === layer && at[1] === head ? 0 : -1"
            @focus="at = [layer, head]" @click="$emit('choose', { layer, head })">{{ short(layer, head) }}</button></td>
        </tr>
      </tbody>
    </table>`,
  methods: {
    factor(layer, head) {
      return this.factors[layer + "." + head];
    },
    short(layer, head) {
      const text = String(this.factor(layer, head) ?? "");
      return text.length > (this.heads > 16 ? 3 : 4) ? "×" : text; // half a number would be another one
    },
    look(layer, head) {
      const factor = this.factor(layer, head);
      return factor === undefined ? "kept" : factor === 0 ? "masked" : "scaled";
    },
    said(layer, head) {
      const factor = this.factor(layer, head);
      return factor === undefined ? "kept" : factor === 0 ? "masked" : "times " + factor;
    },
    move(event) {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      const within = (n, size) => Math.min(Math.max(n, 0), size - 1);
      const [layer, head] = [within(this.at[0] + step[0], this.layers), within(this.at[1] + step[1], this.heads)];
      this.$el.querySelector('[data-head="' + layer + "." + head + '"]').focus();
    },
  },
};
